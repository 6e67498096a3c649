/* Shell $k: its states, and the cotangents of its inputs from those of its states. */
static const int64_t starts_$k[] = {$starts};
static void forward_$k(nbody_model* m) {
  enum { MATRICES = sizeof(starts_$k) / sizeof(*starts_$k) };
  const int64_t T = m->threads;
  const Sizes q = sizes[$index];
  Shell* s = m->shell + $index;
  const real *X[] = {$inputs}, *W[MATRICES];
  for (int i = 0; i < MATRICES; i++) W[i] = m->weights + starts_$k[i];
  window_forward_$window(T, s->edges, q.cutoff, s->v, s->window);
  features_forward_$features(T, s->edges, s->v, s->window, s->H, s->B);
  memset(s->density, 0, s->atoms * q.density * sizeof(real));
  density_forward_$density(T, s->edges, s->slot, s->H, s->B, s->density);
  $messages
  update_forward_$update(T, s->atoms, T, m->species, X, W, $scale, $bias, m->work, s->sums, s->kept, s->state);
}
static void backward_$k(nbody_model* m) {
  enum { MATRICES = sizeof(starts_$k) / sizeof(*starts_$k) };
  const int64_t T = m->threads;
  const Sizes q = sizes[$index];
  const Shared* t = &m->shared;
  Shell* s = m->shell + $index;
  const real *X[] = {$inputs}, *W[MATRICES];
  real* G[] = {$cotangents}; /* where they replace the sums over edges, those are no longer used */
  for (int i = 0; i < MATRICES; i++) W[i] = m->weights + starts_$k[i];
  update_backward_$update(T, s->atoms, T, m->species, X, W, $scale, $bias, m->work, s->sums, s->kept, s->gradient,
    G, 0, 0, 0);
  density_backward_$density(T, s->edges, s->slot, s->density, s->H, s->B, t->gH, t->gB);
  $gradients
  features_backward_$features(T, s->edges, s->v, s->window, t->gH, t->gB, t->gv, t->gw);
  window_backward_$window(T, s->edges, q.cutoff, s->v, t->gw, t->hv);
}
/* Energies of the local atoms from their states, and the gradient by these states. */
static void read_out_$k(nbody_model* m, int64_t num_local, double scale, double* energies, int slopes) {
  enum { C = $channels, U = $hidden };
  const Shell* s = m->shell + $index;
  const int64_t state = sizes[$index].state;
  const real *linear = m->weights + $readout, *first = linear + C, *bias = first + C * U, *last = bias + U;
  #pragma omp parallel for schedule(static) num_threads(team(m->threads, num_local / 32 + 1))
  for (int64_t i = 0; i < num_local; i++) {
    const real* x = s->state + i * state;
    real *g = s->gradient + i * state, u[U + 1], d[U + 1];
    double sum = 0;
    for (int c = 0; c < C; c++) sum += (double)linear[c] * x[c];
    for (int h = 0; h < U; h++) u[h] = bias[h];
    for (int c = 0; c < C; c++) for (int h = 0; h < U; h++) u[h] += x[c] * first[c * U + h];
    for (int h = 0; h < U; h++) {
      const double p = 1 / (1 + exp(-(double)u[h]));
      sum += last[h] * u[h] * p;
      d[h] = (real)(scale * last[h] * p * (1 + u[h] * (1 - p)));
    }
    energies[i] += scale * sum;
    if (slopes) for (int c = 0; c < C; c++) {
      real slope = (real)scale * linear[c];
      for (int h = 0; h < U; h++) slope += d[h] * first[c * U + h];
      g[c] += slope;
    }
  }
}
