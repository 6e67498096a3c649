"""C text that is the same for all models: the interface, memory, edges, and the order of the computation."""

HEADER = """/* Energy, forces and virial of a model of nbody_pyg: interface of the generated program.
   Units: angstrom, eV. A model must not be used by two threads at once; nbody_compute has threads of its own. */
#ifndef NBODY_MODEL_H
#define NBODY_MODEL_H
#include <stdint.h>
#ifdef __cplusplus
extern "C" {
#endif

typedef struct nbody_model nbody_model;

/* Edges of one shell: vector[3 * e] = position of atom source[e] minus position of atom receiver[e], in the periodic image
   that is meant. Every pair nearer than the cutoff of the shell must be given, in both directions. Longer edges are left
   out, so lists with a skin are allowed, and one list for all shells. The edge of an atom to itself is not given (but
   edges to its own images are). */
typedef struct {
  int64_t count;
  const int64_t *receiver, *source;
  const double* vector;
} nbody_edges;

/* The model with the weights in a file, or in memory; NULL: see nbody_error. */
nbody_model* nbody_load(const char* path);
nbody_model* nbody_create(int64_t count, const double* numbers);
void nbody_free(nbody_model* model);
/* Text of the last error in this thread. */
const char* nbody_error(void);

int nbody_num_shells(void);
double nbody_cutoff(int shell); /* of shell 0, 1, ... */
double nbody_reach(void); /* sum of the cutoffs: distance up to which an atom feels others, so that of ghosts */
int nbody_num_elements(void);
int nbody_element(int number); /* atomic number */
const char* nbody_fingerprint(void); /* of this program; a file of weights names its own */

/* Threads of nbody_compute, 1 at the start; results have the same bits for any number. */
int nbody_set_threads(nbody_model* model, int threads);

/* Energies of the atoms 0 .. num_local - 1, and minus the gradient of their sum.

   z           [num_atoms] atomic numbers
   shells      the edges of each shell
   energies    [num_local] with the energies of the isolated atoms
   forces      [num_atoms * 3], overwritten; NULL: only energies
   virial      [9], overwritten: sum over edges of vector_a * dE/dvector_b (rows a), or NULL; the stress is virial / volume

   Atoms from num_local on are ghosts: copies of atoms of other processes or of periodic images. They have forces, to be
   added to those of the atoms that they stand for, and no energies. Receivers of shell k need the state of their sources
   in shell k - 1, so ghosts need edges, too: give all atoms up to nbody_reach(), and all edges among them.
   Returns 0, or a number that is not 0: see nbody_error. */
int nbody_compute(nbody_model* model, int64_t num_atoms, int64_t num_local, const int64_t* z, const nbody_edges* shells,
                  double* energies, double* forces, double* virial);

/* Vectors of edges from positions [num_atoms * 3]; with lattice shifts [count * 3] and the rows of the cell [9], or NULL. */
void nbody_vectors(int64_t count, const int64_t* receiver, const int64_t* source, const double* positions,
                   const double* shift, const double* cell, double* vector);

#ifdef __cplusplus
}
#endif
#endif
"""

#: Types and memory. ``sizes`` is a table of the generated part: numbers per edge or atom of each shell.
MEMORY = """
typedef struct { int64_t harmonics, basis, density, message, before, sums, kept, state; double cutoff; } Sizes;
static const Sizes sizes[] = SIZES;

/* Arrays of one shell; its atoms are the first ones in the order of the computation. */
typedef struct {
  int64_t atoms, edges;
  int64_t *source, *target, *slot;
  double* vector;
  real *v, *window, *H, *B, *density, *message, *before, *sums, *kept, *state, *gradient;
} Shell;

/* Arrays that the shells share, one after the other. */
typedef struct { real *gH, *gB, *hH, *hB, *gv, *hv, *gw; } Shared;

struct nbody_model {
  int threads;
  double* numbers;
  real *weights, *work;
  void *atoms_room, *edges_room;
  int64_t atoms_size, edges_size;
  const int64_t* species;
  Shell shell[SHELLS];
  Shared shared;
};

#if defined(_MSC_VER)
#define PER_THREAD __declspec(thread)
#else
#define PER_THREAD __thread
#endif
static PER_THREAD const char* problem = "no error";
const char* nbody_error(void) { return problem; }

/* y += x */
static void add_to(real* restrict y, const real* restrict x, int64_t n) { for (int64_t i = 0; i < n; i++) y[i] += x[i]; }
/* Make room for ``size`` bytes; what it held is lost. */
static int reserve(void** room, int64_t* held, int64_t size) {
  if (size <= *held) return 0;
  free(*room);
  *held = size + size / 4;
  *room = malloc(*held);
  if (!*room) { *held = 0; problem = "out of memory"; return 1; }
  return 0;
}
/* The next ``size`` bytes of a room, aligned; ``base`` may be NULL to count. */
static void* take(char* base, int64_t* used, int64_t size) {
  void* found = base ? base + *used : 0;
  *used += (size + 63) / 64 * 64;
  return found;
}
static int64_t arrange(nbody_model* m, char* base) {
  int64_t used = 0, most = 0;
#define TAKE(p, count) p = take(base, &used, (count) * (int64_t)sizeof(*p))
  for (int k = 0; k < SHELLS; k++) {
    Shell* s = m->shell + k; const Sizes q = sizes[k]; const int64_t n = s->atoms, e = s->edges;
    TAKE(s->source, e); TAKE(s->target, e); TAKE(s->slot, e); TAKE(s->vector, 3 * e); TAKE(s->v, 3 * e);
    TAKE(s->window, e); TAKE(s->H, e * q.harmonics); TAKE(s->B, e * q.basis);
    TAKE(s->density, n * q.density); TAKE(s->message, n * q.message); TAKE(s->before, n * q.before);
    TAKE(s->sums, n * q.sums); TAKE(s->kept, n * q.kept); TAKE(s->state, n * q.state); TAKE(s->gradient, n * q.state);
    if (e > most) most = e;
  }
  Shared* t = &m->shared;
  TAKE(t->gH, most * HARMONICS); TAKE(t->hH, most * HARMONICS); TAKE(t->gB, most * BASIS); TAKE(t->hB, most * BASIS);
  TAKE(t->gv, 3 * most); TAKE(t->hv, 3 * most); TAKE(t->gw, most);
  return used;
}

nbody_model* nbody_create(int64_t count, const double* numbers) {
  if (count != NUMBERS) { problem = "the number of weights is not that of this program"; return 0; }
  for (int64_t i = 0; i < count; i++) if (!(numbers[i] - numbers[i] == 0)) { problem = "a weight is not finite"; return 0; }
  nbody_model* m = calloc(1, sizeof(nbody_model));
  if (m) {
    m->numbers = malloc(count * sizeof(double)); m->weights = malloc(count * sizeof(real));
    if (m->numbers && m->weights && !nbody_set_threads(m, 1)) {
      for (int64_t i = 0; i < count; i++) { m->numbers[i] = numbers[i]; m->weights[i] = (real)numbers[i]; }
      return m;
    }
  }
  nbody_free(m);
  problem = "out of memory";
  return 0;
}
void nbody_free(nbody_model* m) {
  if (!m) return;
  free(m->numbers); free(m->weights); free(m->work); free(m->atoms_room); free(m->edges_room); free(m);
}
int nbody_set_threads(nbody_model* m, int threads) {
  if (threads < 1) threads = 1;
  if (threads == m->threads) return 0;
  free(m->work);
  m->work = malloc(threads * (int64_t)WORK * sizeof(real));
  m->threads = m->work ? threads : 0;
  if (!m->work) problem = "out of memory";
  return !m->work;
}
int nbody_num_shells(void) { return SHELLS; }
double nbody_cutoff(int shell) { return shell >= 0 && shell < SHELLS ? sizes[shell].cutoff : 0; }
double nbody_reach(void) { double sum = 0; for (int k = 0; k < SHELLS; k++) sum += sizes[k].cutoff; return sum; }
int nbody_num_elements(void) { return SPECIES; }
int nbody_element(int number) { return number >= 0 && number < SPECIES ? elements[number] : 0; }
const char* nbody_fingerprint(void) { return FINGERPRINT; }

static uint64_t digest(uint64_t sum, const void* bytes, size_t size) { /* FNV-1a over words of 8 bytes */
  const uint64_t* words = bytes;
  for (size_t i = 0; i < size / 8; i++) sum = (sum ^ words[i]) * 1099511628211u;
  return sum;
}
nbody_model* nbody_load(const char* path) {
  char head[8 + 64]; int64_t count; uint64_t sum; nbody_model* m = 0;
  FILE* file = fopen(path, "rb");
  if (!file) { problem = "the file of weights cannot be opened"; return 0; }
  double* numbers = malloc(NUMBERS * sizeof(double));
  problem = "this is no file of weights, or it is damaged";
  if (numbers && fread(head, 1, sizeof head, file) == sizeof head && !memcmp(head, "NBODYW1", 8)) {
    if (memcmp(head + 8, FINGERPRINT, 64)) problem = "the weights belong to another program; use the files of one export";
    else if (fread(&count, 8, 1, file) == 1 && count == NUMBERS && fread(&sum, 8, 1, file) == 1 &&
             fread(numbers, sizeof(double), NUMBERS, file) == NUMBERS && fgetc(file) == EOF &&
             digest(14695981039346656037u, numbers, NUMBERS * sizeof(double)) == sum)
      m = nbody_create(NUMBERS, numbers);
  }
  free(numbers); fclose(file);
  return m;
}
void nbody_vectors(int64_t count, const int64_t* receiver, const int64_t* source, const double* positions,
                   const double* shift, const double* cell, double* vector) {
  for (int64_t e = 0; e < count; e++) for (int a = 0; a < 3; a++) {
    double d = positions[3 * source[e] + a] - positions[3 * receiver[e] + a];
    if (shift && cell) d += shift[3*e] * cell[a] + shift[3*e + 1] * cell[3 + a] + shift[3*e + 2] * cell[6 + a];
    vector[3 * e + a] = d;
  }
}
"""

#: Edges in the order of their targets, then the shells forwards, the energies, and the shells backwards.
COMPUTE = """
static inline double squared(const double* v) { return v[0] * v[0] + v[1] * v[1] + v[2] * v[2]; }
static inline int is_self(int64_t i, int64_t j, double square) { return i == j && square == 0; }

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
    if (z[i] < 1 || z[i] > 118 || slots[z[i]] < 0) { problem = "z holds an element that the model does not know"; return 1; }
  }
  for (int k = SHELLS - 1; k >= 0; k--) {
    const nbody_edges g = given[k]; const double limit = sizes[k].cutoff * sizes[k].cutoff;
    next[k] = take(m->atoms_room, &used, num_atoms * 8);
    memset(next[k], 0, num_atoms * 8);
    for (int64_t e = 0; e < g.count; e++) {
      const int64_t i = g.receiver[e], j = g.source[e];
      const double square = squared(g.vector + 3 * e);
      if (i < 0 || j < 0 || i >= num_atoms || j >= num_atoms) { problem = "an edge names an atom beyond num_atoms"; return 1; }
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
#define PUT(i, p, w) do { const int64_t at = next[k][i]++; s->source[at] = p; s->target[at] = place[i]; \\
  s->slot[at] = place[i] * SPECIES + species[p]; \\
  for (int a = 0; a < 3; a++) { s->vector[3 * at + a] = (w)[a]; s->v[3 * at + a] = (real)(w)[a]; } } while (0)
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
/* Features of the edges of a shell from their cotangents gH, gB: forces and virial. */
static void pull(const nbody_model* m, int k, const int64_t* atom_of, double* forces, double* virial) {
  const Shell* s = m->shell + k; const Shared* t = &m->shared;
  for (int64_t e = 0; e < s->edges; e++) {
    double* source = forces + 3 * atom_of[s->source[e]]; double* target = forces + 3 * atom_of[s->target[e]];
    for (int a = 0; a < 3; a++) {
      const double g = (double)t->gv[3 * e + a] + t->hv[3 * e + a];
      source[a] -= g; target[a] += g;
      for (int b = 0; b < 3; b++) virial[3 * b + a] += s->vector[3 * e + b] * g;
    }
  }
}
#ifdef REPULSION
/* Screened repulsion of nuclei: half of it belongs to each atom of a pair. */
static void repel(const nbody_model* m, int64_t num_local, const int64_t* atom_of, double* energies, double* forces, double* virial) {
  const Shell* s = m->shell + WIDEST; const double* given = m->numbers + REPULSION;
  const double *charge = given, *rate = given + SPECIES * SPECIES, *end = rate + SPECIES * SPECIES, *screen = end + SPECIES * SPECIES;
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
    if (t < 1) { w = t * t * t * (10 - 15 * t + 6 * t * t); w1 = -30 * t * t * (1 - t) * (1 - t) / (reach * (1 - FADE_FROM)); }
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
int nbody_compute(nbody_model* m, int64_t num_atoms, int64_t num_local, const int64_t* z, const nbody_edges* shells,
                  double* energies, double* forces, double* virial) {
  const int64_t* atom_of; double unused[9];
  if (prepare(m, num_atoms, num_local, z, shells, &atom_of)) return 1;
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
#ifdef REPULSION
  repel(m, num_local, atom_of, energies, forces, virial);
#endif
  for (int64_t i = 0; i < num_local; i++) energies[i] += isolated[m->species[i]];
  if (forces) for (int k = SHELLS - 1; k >= 0; k--) { backward[k](m); pull(m, k, atom_of, forces, virial); }
  return 0;
}
"""

#: The functions of one shell; names in capitals are filled in.
SHELL = """
static const real* const* matrices_{k}(const nbody_model* m, const real** found) {{
  const real* w = m->weights + {first};
  {matrices}
  return found;
}}
static void forward_{k}(nbody_model* m) {{
  const int64_t T = m->threads; Shell* s = m->shell + {index}; const Sizes q = sizes[{index}];
  window_forward_{window}(T, s->edges, q.cutoff, s->v, s->window);
  features_forward_{features}(T, s->edges, s->v, s->window, s->H, s->B);
  memset(s->density, 0, s->atoms * q.density * sizeof(real));
  density_forward_{density}(T, s->edges, s->slot, s->H, s->B, s->density);
  {messages}
  const real* X[] = {{{inputs}}}; const real* W[{count}];
  update_forward_{update}(T, s->atoms, T, m->species, X, matrices_{k}(m, W), {scale}, {bias}, m->work, s->sums, s->kept, s->state);
}}
static void backward_{k}(nbody_model* m) {{
  const int64_t T = m->threads; Shell* s = m->shell + {index}; const Shared* t = &m->shared; const Sizes q = sizes[{index}];
  const real* X[] = {{{inputs}}}; const real* W[{count}]; real* G[] = {{{cotangents}}}; /* of X, in the same memory */
  update_backward_{update}(T, s->atoms, T, m->species, X, matrices_{k}(m, W), {scale}, {bias}, m->work, s->sums, s->kept,
    s->gradient, G, 0, 0, 0);
  density_backward_{density}(T, s->edges, s->slot, s->density, s->H, s->B, t->gH, t->gB);
  {gradients}
  features_backward_{features}(T, s->edges, s->v, s->window, t->gH, t->gB, t->gv, t->gw);
  window_backward_{window}(T, s->edges, q.cutoff, s->v, t->gw, t->hv);
}}
static void read_out_{k}(nbody_model* m, int64_t num_local, double scale, double* energies, int slopes) {{
  const Shell* s = m->shell + {index}; const real *linear = m->weights + {readout}; enum {{ C = {channels}, U = {hidden} }};
  {network}
  #pragma omp parallel for schedule(static) num_threads(team(m->threads, num_local / 32 + 1))
  for (int64_t i = 0; i < num_local; i++) {{
    const real* x = s->state + i * {state}; real* g = s->gradient + i * {state};
    double sum = 0;
    for (int c = 0; c < C; c++) sum += (double)linear[c] * x[c];
    {value}
    energies[i] += scale * sum;
    if (slopes) {{ for (int c = 0; c < C; c++) g[c] += (real)scale * linear[c]; {slope} }}
  }}
}}
"""

#: The small network of a readout: hidden units u, their activation, and slopes.
NETWORK = "const real *first = linear + C, *bias = first + C * U, *last = bias + U;"
NETWORK_VALUE = """real u[U], d[U];
    for (int h = 0; h < U; h++) u[h] = bias[h];
    for (int c = 0; c < C; c++) for (int h = 0; h < U; h++) u[h] += x[c] * first[c * U + h];
    for (int h = 0; h < U; h++) {
      const double p = 1 / (1 + exp(-(double)u[h]));
      sum += last[h] * u[h] * p; d[h] = (real)(scale * last[h] * p * (1 + u[h] * (1 - p)));
    }"""
NETWORK_SLOPE = """for (int c = 0; c < C; c++) { real sum_c = 0; for (int h = 0; h < U; h++) sum_c += d[h] * first[c * U + h]; g[c] += sum_c; }"""
