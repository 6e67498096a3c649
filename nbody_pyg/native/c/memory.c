/* Numbers per edge or atom of the arrays of one shell, and its radius. */
typedef struct {
  int64_t harmonics, basis, density, message, before, sums, kept, state;
  double cutoff;
} Sizes;
static const Sizes sizes[SHELLS] = SIZES;

/* Arrays of one shell; its atoms are the first ones in the order of the computation. */
typedef struct {
  int64_t atoms, edges;
  int64_t *source, *target, *slot;
  double* vector;
  real *v, *window, *H, *B, *density, *message, *before, *sums, *kept, *state, *gradient;
} Shell;

/* Arrays that the shells share, one after the other. */
typedef struct { real *gH, *gB, *hH, *hB, *gv, *hv, *gw; } Shared;

/* Latent charges, by atom: first edge, features, and the derivatives of the energy. */
typedef struct { int64_t* first; double *feature, *charge, *pull, *slope, *gradient; } Charges;

struct nbody_model {
  int threads;
  double* numbers;
  real *weights, *work;
  void *atoms_room, *edges_room;
  int64_t atoms_size, edges_size;
  const int64_t* species;
  Shell shell[SHELLS];
  Shared shared;
  Charges charges;
};

static __thread const char* problem = "no error";
const char* nbody_error(void) { return problem; }

/* y += x */
static void add_to(real* restrict y, const real* restrict x, int64_t n) {
  for (int64_t i = 0; i < n; i++) y[i] += x[i];
}
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
#ifdef CHARGES
  Charges* q = &m->charges; const int64_t n = m->shell[0].atoms;
  TAKE(q->first, n + 1); TAKE(q->feature, n * FEATURES); TAKE(q->charge, n * CHARGES); TAKE(q->pull, 3 * n);
  TAKE(q->slope, n * CHARGES); TAKE(q->gradient, n * FEATURES);
#endif
  return used;
}

nbody_model* nbody_create(int64_t count, const double* numbers) {
  if (count != NUMBERS) { problem = "the number of weights is not that of this program"; return 0; }
  for (int64_t i = 0; i < count; i++)
    if (!(numbers[i] - numbers[i] == 0)) { problem = "a weight is not finite"; return 0; }
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
int64_t nbody_memory(const nbody_model* m) {
  const int64_t weights = NUMBERS * (sizeof(double) + sizeof(real)), work = m->threads * (int64_t)WORK * sizeof(real);
  return sizeof(nbody_model) + weights + work + m->atoms_size + m->edges_size;
}
int nbody_num_shells(void) { return SHELLS; }
double nbody_cutoff(int shell) { return shell >= 0 && shell < SHELLS ? sizes[shell].cutoff : 0; }
#ifdef CHARGES
double nbody_reach(void) { return INFINITY; }
#else
double nbody_reach(void) { double sum = 0; for (int k = 0; k < SHELLS; k++) sum += sizes[k].cutoff; return sum; }
#endif
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
    if (memcmp(head + 8, FINGERPRINT, 64))
      problem = "the weights belong to another program; use the files of one export";
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
