/* Energy of five atoms. Compile and run: make example && ./example
   or: cc -O2 -march=native -fopenmp -w example.c nbody_model.c -lm -o example && ./example */
#include <stdio.h>
#include "nbody_model.h"

enum { N = $count };

int main(void) {
  const int64_t z[N] = {$numbers};
  const double positions[3 * N] = {$positions};
  int64_t receiver[N * N], source[N * N], count = 0;
  double vector[3 * N * N], energies[N], forces[3 * N], virial[9], total = 0;

  /* The edges: all pairs in both directions, in one list for all shells. The program leaves out what is too long. */
  for (int i = 0; i < N; i++)
    for (int j = 0; j < N; j++)
      if (i != j) {
        receiver[count] = i;
        source[count++] = j;
      }
  nbody_vectors(count, receiver, source, positions, 0, 0, vector);
  nbody_edges shells[$shells];
  for (int k = 0; k < nbody_num_shells(); k++) shells[k] = (nbody_edges){count, receiver, source, vector};

  nbody_model* model = nbody_load("nbody_model.weights");
  if (!model || nbody_compute_whole(model, N, z, positions, shells, energies, forces, virial)) {
    fprintf(stderr, "%s\n", nbody_error());
    return 1;
  }
  for (int i = 0; i < N; i++) {
    total += energies[i];
    printf("atom %d: %14.8f eV, force %12.6f %12.6f %12.6f eV/A\n", i, energies[i], forces[3 * i], forces[3 * i + 1],
           forces[3 * i + 2]);
  }
  printf("energy %.10f eV\n", total);
  nbody_free(model);
  return 0;
}
