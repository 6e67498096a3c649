static inline double squared(const double* v) { return v[0] * v[0] + v[1] * v[1] + v[2] * v[2]; }
static inline int is_self(int64_t i, int64_t j, double square) { return i == j && square == 0; }

#ifdef INNER
/* Length of an edge of squared length ``square`` below the inner cutoff ``start``, over r, and its derivative by r. */
static void limited(double square, double start, double* factor, double* slope) {
  const double r = sqrt(square), width = 1 - FLAT_FROM, u = (r / start - FLAT_FROM) / width;
  const double t = u > 0 ? u : 0, length = start * (1 - width * (0.5 - t * t * t * (1 - 0.5 * t)));
  *factor = length / r;
  *slope = (t * t * (3 - 2 * t) - *factor) / r;
}
static inline double inner(const nbody_model* m, int64_t source, int64_t target) {
  return m->numbers[INNER + source * SPECIES + target];
}
#endif
/* Which atoms need a state in which shell, their order (local ones first), and the edges of each shell by target. */
static int prepare(nbody_model* m, int64_t num_atoms, int64_t num_local, const int64_t* z, const nbody_edges* given,
                   const int64_t** atom_of) {
  int64_t slots[120], used = 0;
  for (int i = 0; i < 120; i++) slots[i] = -1;
  for (int i = 0; i < SPECIES; i++) slots[elements[i]] = i;
  if (num_local < 0 || num_atoms < num_local) { problem = "num_local must lie in 0 .. num_atoms"; return 1; }
  if (reserve(&m->atoms_room, &m->atoms_size, (4 + SHELLS) * (num_atoms + 8) * 8)) return 1;
  int64_t* need = take(m->atoms_room, &used, num_atoms * 8); /* the highest shell in which an atom has a state */
  int64_t* place = take(m->atoms_room, &used, num_atoms * 8);
  int64_t* order = take(m->atoms_room, &used, num_atoms * 8);
  int64_t* species = take(m->atoms_room, &used, num_atoms * 8);
  int64_t* next[SHELLS];
  for (int64_t i = 0; i < num_atoms; i++) {
    need[i] = i < num_local ? SHELLS : 0;
    if (z[i] < 1 || z[i] > 118 || slots[z[i]] < 0) {
      problem = "z holds an element that the model does not know";
      return 1;
    }
  }
  for (int k = SHELLS - 1; k >= 0; k--) {
    const nbody_edges g = given[k]; const double limit = sizes[k].cutoff * sizes[k].cutoff;
    next[k] = take(m->atoms_room, &used, num_atoms * 8);
    memset(next[k], 0, num_atoms * 8);
    for (int64_t e = 0; e < g.count; e++) {
      const int64_t i = g.receiver[e], j = g.source[e];
      const double square = squared(g.vector + 3 * e);
      if (i < 0 || j < 0 || i >= num_atoms || j >= num_atoms) {
        problem = "an edge names an atom beyond num_atoms";
        return 1;
      }
      if (!(square < limit)) { if (square != square) { problem = "a vector of an edge is NaN"; return 1; } continue; }
      if (need[i] <= k || is_self(i, j, square)) continue;
      next[k][i]++;
      if (need[j] < k) need[j] = k;
    }
  }
  int64_t placed = 0;
  for (int k = SHELLS; k >= 0; k--) {
    for (int64_t i = 0; i < num_atoms; i++) if (need[i] == k) { order[placed] = i; place[i] = placed++; }
    if (k) m->shell[k - 1].atoms = placed;
  }
  for (int64_t p = 0; p < num_atoms; p++) species[p] = slots[z[order[p]]];
  for (int k = 0; k < SHELLS; k++) {
    int64_t total = 0;
    for (int64_t p = 0; p < m->shell[k].atoms; p++) {
      const int64_t here = next[k][order[p]] + 1; /* with the edge to itself, which comes first */
      next[k][order[p]] = total; total += here;
    }
    m->shell[k].edges = total;
  }
  if (reserve(&m->edges_room, &m->edges_size, arrange(m, 0))) return 1;
  arrange(m, m->edges_room);
  for (int k = 0; k < SHELLS; k++) {
    Shell* s = m->shell + k; const nbody_edges g = given[k]; const double limit = sizes[k].cutoff * sizes[k].cutoff;
    static const double zero[3] = {0, 0, 0};
#define PUT(i, p, w) do { const int64_t at = next[k][i]++; s->source[at] = p; s->target[at] = place[i]; \
  s->slot[at] = place[i] * SPECIES + species[p]; \
  double factor = 1; LIMIT(i, p, w); \
  for (int a = 0; a < 3; a++) { s->vector[3 * at + a] = (w)[a]; s->v[3 * at + a] = (real)(factor * (w)[a]); } } while (0)
#ifdef INNER
#define LIMIT(i, p, w) do { double unused, square = squared(w), start = inner(m, species[p], species[place[i]]); \
  if (square < start * start && square > 0) limited(square, start, &factor, &unused); } while (0)
#else
#define LIMIT(i, p, w)
#endif
    for (int64_t p = 0; p < s->atoms; p++) PUT(order[p], p, zero);
    for (int64_t e = 0; e < g.count; e++) {
      const int64_t i = g.receiver[e], j = g.source[e];
      const double square = squared(g.vector + 3 * e);
      if (square < limit && need[i] > k && !is_self(i, j, square)) PUT(i, place[j], g.vector + 3 * e);
    }
  }
  m->species = species;
  *atom_of = order;
  return 0;
}
/* Forces and virial from the derivatives by the vectors of the edges of a shell. */
static void pull(const nbody_model* m, int k, const int64_t* atom_of, double* forces, double* virial) {
  const Shell* s = m->shell + k; const Shared* t = &m->shared;
  for (int64_t e = 0; e < s->edges; e++) {
    double* source = forces + 3 * atom_of[s->source[e]]; double* target = forces + 3 * atom_of[s->target[e]];
    const double* v = s->vector + 3 * e;
    double g[3];
    for (int a = 0; a < 3; a++) g[a] = (double)t->gv[3 * e + a] + t->hv[3 * e + a];
#ifdef INNER
    const double start = inner(m, s->slot[e] % SPECIES, m->species[s->target[e]]), square = squared(v);
    if (square < start * start && square > 0) {
      double factor, slope;
      limited(square, start, &factor, &slope);
      const double along = (v[0] * g[0] + v[1] * g[1] + v[2] * g[2]) * slope / sqrt(square);
      for (int a = 0; a < 3; a++) g[a] = factor * g[a] + along * v[a];
    }
#endif
    for (int a = 0; a < 3; a++) {
      source[a] -= g[a]; target[a] += g[a];
      for (int b = 0; b < 3; b++) virial[3 * b + a] += v[b] * g[a];
    }
  }
}
#ifdef REPULSION
/* Screened repulsion of nuclei: half of it belongs to each atom of a pair. */
static void repel(const nbody_model* m, int64_t num_local, const int64_t* atom_of, double* energies, double* forces,
                  double* virial) {
  enum { PAIRS = SPECIES * SPECIES };
  const Shell* s = m->shell + WIDEST;
  const double *charge = m->numbers + REPULSION, *rate = charge + PAIRS, *end = rate + PAIRS, *screen = end + PAIRS;
  for (int64_t e = 0; e < s->edges; e++) {
    const int64_t target = s->target[e], kind = s->slot[e] % SPECIES * SPECIES + m->species[target];
    const double* v = s->vector + 3 * e; const double square = squared(v);
    if (target >= num_local || square == 0 || !(square < end[kind] * end[kind])) continue;
    const double r = sqrt(square), reach = end[kind];
    double f = 0, f1 = 0;
    for (int i = 0; i < 4; i++) {
      const double w = screen[i] * exp(-screen[4 + i] * r * rate[kind]);
      f += w; f1 -= screen[4 + i] * rate[kind] * w;
    }
    double t = (1 - r / reach) / (1 - FADE_FROM), w = 1, w1 = 0;
    if (t < 1) {
      w = t * t * t * (10 - 15 * t + 6 * t * t);
      w1 = -30 * t * t * (1 - t) * (1 - t) / (reach * (1 - FADE_FROM));
    }
    const double pair = 0.5 * charge[kind] / r;
    energies[target] += pair * f * w;
    if (!forces) continue;
    const double slope = pair * (f1 * w + f * w1 - f * w / r) / r;
    for (int a = 0; a < 3; a++) {
      forces[3 * atom_of[s->source[e]] + a] -= slope * v[a]; forces[3 * atom_of[target] + a] += slope * v[a];
      for (int b = 0; b < 3; b++) virial[3 * b + a] += v[b] * slope * v[a];
    }
  }
}
#endif
static int compute(nbody_model* m, int64_t num_atoms, int64_t num_local, const int64_t* z, const double* positions,
                   const nbody_edges* shells, double* energies, double* forces, double* virial) {
  const int64_t* atom_of; double unused[9];
  if (prepare(m, num_atoms, num_local, z, shells, &atom_of)) return 1;
#ifdef CHARGES
  if (check_positions(m, positions)) return 1;
#endif
  if (!virial) virial = unused;
  memset(virial, 0, 9 * sizeof(double));
  if (forces) memset(forces, 0, 3 * num_atoms * sizeof(double));
  for (int k = 0; k < SHELLS; k++) forward[k](m);
  const double scale = m->numbers[GLOBAL], *shift = m->numbers + GLOBAL + 1, *isolated = shift + SPECIES;
  for (int64_t i = 0; i < num_local; i++) energies[i] = scale * shift[m->species[i]];
  for (int k = 0; k < SHELLS; k++) {
    memset(m->shell[k].gradient, 0, m->shell[k].atoms * sizes[k].state * sizeof(real));
    read_out[k](m, num_local, scale, energies, forces != 0);
  }
#ifdef CHARGES
  charges(m, positions, scale, energies, forces, virial);
#endif
#ifdef REPULSION
  repel(m, num_local, atom_of, energies, forces, virial);
#endif
  for (int64_t i = 0; i < num_local; i++) energies[i] += isolated[m->species[i]];
  if (forces) for (int k = SHELLS - 1; k >= 0; k--) { backward[k](m); pull(m, k, atom_of, forces, virial); }
  return 0;
}
int nbody_compute(nbody_model* m, int64_t num_atoms, int64_t num_local, const int64_t* z, const nbody_edges* shells,
                  double* energies, double* forces, double* virial) {
#ifdef CHARGES
  problem = "latent charges act between all atoms: give the positions of a whole system (nbody_compute_whole)";
  return 1;
#endif
  return compute(m, num_atoms, num_local, z, 0, shells, energies, forces, virial);
}
int nbody_compute_whole(nbody_model* m, int64_t num_atoms, const int64_t* z, const double* positions,
                        const nbody_edges* shells, double* energies, double* forces, double* virial) {
  return compute(m, num_atoms, num_atoms, z, positions, shells, energies, forces, virial);
}
