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
