/* Latent charges of a whole open system, for each channel:

     q_i = own_i + sum_j sum_b B_b(r_ij) (u_bi v_j - u_bj v_i)
     e_i = chi_i q_i + eta_i q_i^2 + strength / 2 q_i sum_j q_j g(r_ij),   g(r) = erf(beta r) / r

   own, chi, eta, u and v are the features of an atom: linear in its scalars in the last shell. An edge and its reverse
   have the same B. So every sum is one over the edges or the neighbors of an atom, in their order, and has the same bits
   for any number of threads. All atoms are local: their order is that of the caller. */
enum { AT_CHI = CHARGES, AT_ETA = 2 * CHARGES, AT_U = 3 * CHARGES, AT_V = (3 + FUNCTIONS) * CHARGES };
static const double root_pi = 1.77245385090551602730;

/* Factor that bounds the states of an atom. */
static double bound(const real* x, int64_t n) {
  double sum = 0;
  for (int64_t k = 0; k < n; k++) sum += (double)x[k] * x[k];
  return 1 / sqrt(1 + sum / n);
}
static void find_features(nbody_model* m) {
  const Shell* s = m->shell + SHELLS - 1; const int64_t state = sizes[SHELLS - 1].state;
  const double *constant = m->numbers + CHARGE_FEATURES, *weight = constant + SPECIES * FEATURES;
  #pragma omp parallel for schedule(static) num_threads(team(m->threads, s->atoms / 32 + 1))
  for (int64_t i = 0; i < s->atoms; i++) {
    const real* x = s->state + i * state; const double factor = bound(x, state);
    double* f = m->charges.feature + i * FEATURES;
    memcpy(f, constant + m->species[i] * FEATURES, FEATURES * sizeof(double));
    for (int c = 0; c < SCALARS; c++) for (int k = 0; k < FEATURES; k++) f[k] += factor * x[c] * weight[c * FEATURES + k];
  }
}
static void find_charges(nbody_model* m) {
  const Shell* s = m->shell; const Charges* q = &m->charges;
  int64_t e = 0;
  for (int64_t i = 0; i < s->atoms; i++) { q->first[i] = e; while (e < s->edges && s->target[e] == i) e++; }
  q->first[s->atoms] = e;
  #pragma omp parallel for schedule(static) num_threads(team(m->threads, s->atoms / 32 + 1))
  for (int64_t i = 0; i < s->atoms; i++) {
    const double* f = q->feature + i * FEATURES; double* charge = q->charge + i * CHARGES;
    for (int c = 0; c < CHARGES; c++) charge[c] = f[c];
    if (FUNCTIONS) for (int64_t e = q->first[i]; e < q->first[i + 1]; e++) {
      const double* g = q->feature + s->source[e] * FEATURES; const real* B = s->B + e * FUNCTIONS;
      for (int c = 0; c < CHARGES; c++) {
        double given = 0, taken = 0;
        for (int b = 0; b < FUNCTIONS; b++) {
          given += B[b] * f[AT_U + b * CHARGES + c]; taken += B[b] * g[AT_U + b * CHARGES + c];
        }
        charge[c] += given * g[AT_V + c] - taken * f[AT_V + c];
      }
    }
  }
}
/* g(r) and its derivative over r, by Boys functions: these are finite at r = 0. */
static inline void kernel(double square, double beta, double* g, double* slope) {
  const double t = square * beta * beta;
  double f0 = 0, f1 = 0;
  if (t < 0.25) {
    double term = 1;
    for (int n = 0; n < 12; n++) { f0 += term / (2 * n + 1); f1 += term / (2 * n + 3); term *= -t / (n + 1); }
  } else {
    const int near = t < 36; /* beyond it the charges are points, to rounding */
    const double x = sqrt(t);
    f0 = 0.5 * root_pi * (near ? erf(x) : 1) / x;
    f1 = (f0 - (near ? exp(-t) : 0)) / (2 * t);
  }
  *g = 2 * beta / root_pi * f0;
  *slope = -4 * beta * beta * beta / root_pi * f1;
}
/* Energies of all pairs and of the charges by themselves, and the derivatives by charges, positions and own features. */
static void sum_pairs(nbody_model* m, const double* positions, double scale, double* energies) {
  const int64_t atoms = m->shell[0].atoms; const Charges* q = &m->charges;
  const double beta = m->numbers[CHARGE_NUMBERS], *strength = m->numbers + CHARGE_NUMBERS + 1;
  #pragma omp parallel for schedule(static) num_threads(team(m->threads, atoms / 32 + 1))
  for (int64_t i = 0; i < atoms; i++) {
    const double *here = q->charge + i * CHARGES, *f = q->feature + i * FEATURES;
    double *pull = q->pull + 3 * i, *slope = q->slope + i * CHARGES, *G = q->gradient + i * FEATURES;
    double weighted[CHARGES], field[CHARGES];
    for (int c = 0; c < CHARGES; c++) { weighted[c] = scale * strength[c] * here[c]; field[c] = 0; }
    for (int a = 0; a < 3; a++) pull[a] = 0;
    for (int64_t j = 0; j < atoms; j++) {
      if (j == i) continue;
      const double* there = q->charge + j * CHARGES;
      double d[3], square = 0, g, along, product = 0;
      for (int a = 0; a < 3; a++) { d[a] = positions[3 * i + a] - positions[3 * j + a]; square += d[a] * d[a]; }
      kernel(square, beta, &g, &along);
      for (int c = 0; c < CHARGES; c++) { field[c] += there[c] * g; product += weighted[c] * there[c]; }
      for (int a = 0; a < 3; a++) pull[a] += product * along * d[a];
    }
    for (int c = 0; c < CHARGES; c++) {
      const double chi = scale * f[AT_CHI + c], eta = scale * f[AT_ETA + c], x = here[c];
      energies[i] += 0.5 * weighted[c] * field[c] + chi * x + eta * x * x;
      slope[c] = scale * strength[c] * field[c] + chi + 2 * eta * x;
      G[c] = slope[c]; G[AT_CHI + c] = scale * x; G[AT_ETA + c] = scale * x * x;
    }
  }
}
/* Derivatives by the features of the transfers. */
static void transfer_slopes(const nbody_model* m) {
  const Shell* s = m->shell; const Charges* q = &m->charges;
  #pragma omp parallel for schedule(static) num_threads(team(m->threads, s->atoms / 32 + 1))
  for (int64_t i = 0; i < s->atoms; i++) {
    double* G = q->gradient + i * FEATURES;
    memset(G + AT_U, 0, (FUNCTIONS + 1) * CHARGES * sizeof(double));
    for (int64_t e = q->first[i]; e < q->first[i + 1]; e++) {
      const int64_t j = s->source[e]; const double* g = q->feature + j * FEATURES; const real* B = s->B + e * FUNCTIONS;
      for (int c = 0; c < CHARGES; c++) {
        const double step = q->slope[i * CHARGES + c] - q->slope[j * CHARGES + c];
        for (int b = 0; b < FUNCTIONS; b++) {
          G[AT_U + b * CHARGES + c] += B[b] * g[AT_V + c] * step; G[AT_V + c] -= B[b] * g[AT_U + b * CHARGES + c] * step;
        }
      }
    }
  }
}
/* Derivatives by the radial functions of the edges are added to ``gB``. */
static void transfer_gradients(const nbody_model* m, real* gB) {
  const Shell* s = m->shell; const Charges* q = &m->charges;
  #pragma omp parallel for schedule(static) num_threads(team(m->threads, s->edges / 1024 + 1))
  for (int64_t e = 0; e < s->edges; e++) {
    const double *f = q->feature + s->target[e] * FEATURES, *g = q->feature + s->source[e] * FEATURES;
    const double* slope = q->slope + s->target[e] * CHARGES;
    for (int b = 0; b < FUNCTIONS; b++) {
      double sum = 0;
      for (int c = 0; c < CHARGES; c++) {
        const int u = AT_U + b * CHARGES + c;
        sum += slope[c] * (f[u] * g[AT_V + c] - g[u] * f[AT_V + c]);
      }
      gB[e * FUNCTIONS + b] += (real)sum;
    }
  }
}
/* From the derivatives by the features to those by the states of the last shell. */
static void feature_gradients(nbody_model* m) {
  const Shell* s = m->shell + SHELLS - 1; const int64_t state = sizes[SHELLS - 1].state;
  const double* weight = m->numbers + CHARGE_FEATURES + SPECIES * FEATURES;
  #pragma omp parallel for schedule(static) num_threads(team(m->threads, s->atoms / 32 + 1))
  for (int64_t i = 0; i < s->atoms; i++) {
    const real* x = s->state + i * state; real* g = s->gradient + i * state;
    const double *G = m->charges.gradient + i * FEATURES, factor = bound(x, state);
    double along = 0;
    for (int c = 0; c < SCALARS; c++) {
      double sum = 0;
      for (int k = 0; k < FEATURES; k++) sum += weight[c * FEATURES + k] * G[k];
      along += sum * x[c];
      g[c] += (real)(factor * sum);
    }
    for (int64_t k = 0; k < state; k++) g[k] -= (real)(factor * factor * factor * along / state * x[k]);
  }
}
/* The atoms are an open system at these positions: no edge goes to a periodic image. */
static int check_positions(const nbody_model* m, const double* positions) {
  for (int64_t i = 0; i < 3 * m->shell[0].atoms; i++)
    if (!(positions[i] - positions[i] == 0)) { problem = "a position is not finite"; return 1; }
  for (int k = 0; k < SHELLS; k++) for (int64_t e = 0; e < m->shell[k].edges; e++) for (int a = 0; a < 3; a++) {
    const Shell* s = m->shell + k;
    const double d = positions[3 * s->source[e] + a] - positions[3 * s->target[e] + a];
    if (fabs(s->vector[3 * e + a] - d) > 1e-3) {
      problem = "a vector of an edge is not the difference of positions; a model with charges takes open systems only";
      return 1;
    }
  }
  return 0;
}
/* Adds energies of charges and, with ``forces``, all but what goes through the states and radial functions. */
static void charges(nbody_model* m, const double* positions, double scale, double* energies, double* forces,
                    double* virial) {
  find_features(m);
  find_charges(m);
  sum_pairs(m, positions, scale, energies);
  if (!forces) return;
  if (FUNCTIONS) transfer_slopes(m);
  feature_gradients(m);
  for (int64_t i = 0; i < m->shell[0].atoms; i++) for (int a = 0; a < 3; a++) {
    const double pull = m->charges.pull[3 * i + a];
    forces[3 * i + a] -= pull;
    for (int b = 0; b < 3; b++) virial[3 * b + a] += (positions[3 * i + b] - positions[b]) * pull;
  }
}
