/* Energy, forces and virial of a model of nbody_pyg: interface of the generated program.
   Units: angstrom, eV. A model must not be used by two threads at once; nbody_compute has threads of its own. */
#ifndef NBODY_MODEL_H
#define NBODY_MODEL_H
#include <stdint.h>
#ifdef __cplusplus
extern "C" {
#endif

typedef struct nbody_model nbody_model;

/* Edges of one shell. vector[3 * e] is the position of atom source[e] minus that of atom receiver[e], in the periodic
   image that is meant. Every pair nearer than the cutoff of the shell must be given, in both directions. Longer edges
   are left out, so lists with a skin are allowed, and one list for all shells. An atom has edges to its own images; its
   edge to itself is not given. */
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
/* Distance up to which an atom feels others, so that of ghosts: the sum of the cutoffs, or infinite for a model with
   latent charges, which needs whole systems. */
double nbody_reach(void);
int nbody_num_elements(void);
int nbody_element(int number); /* atomic number */
const char* nbody_fingerprint(void); /* of this program; a file of weights names its own */

/* Threads of nbody_compute, 1 at the start; results have the same bits for any number. */
int nbody_set_threads(nbody_model* model, int threads);
/* Bytes that a model holds; they grow with the number of edges of the largest structure. */
int64_t nbody_memory(const nbody_model* model);

/* Energies of the atoms 0 .. num_local - 1, and minus the gradient of their sum.

   z           [num_atoms] atomic numbers
   shells      the edges of each shell
   energies    [num_local] with the energies of the isolated atoms
   forces      [num_atoms * 3], overwritten; NULL: only energies
   virial      [9], overwritten, or NULL: sum over edges of vector_a * dE/dvector_b (rows a); stress = virial / volume

   Atoms from num_local on are ghosts: copies of atoms of other processes or of periodic images. They have no energies.
   Their forces are to be added to those of the atoms that they stand for. Receivers of shell k need the state of their
   sources in shell k - 1, so ghosts need edges, too: give all atoms up to nbody_reach(), and all edges among them.
   Returns 0, or a number that is not 0: see nbody_error. */
int nbody_compute(nbody_model* model, int64_t num_atoms, int64_t num_local, const int64_t* z, const nbody_edges* shells,
                  double* energies, double* forces, double* virial);

/* The same for a whole system at positions [num_atoms * 3], without ghosts. A model with latent charges sums over all pairs
   of its atoms, so it is refused by nbody_compute, takes only open systems, without edges to periodic images, and
   computes neutral ones. Other models do not read the positions. */
int nbody_compute_whole(nbody_model* model, int64_t num_atoms, const int64_t* z, const double* positions,
                        const nbody_edges* shells, double* energies, double* forces, double* virial);

/* Vectors of edges between positions [num_atoms * 3], with lattice shifts [count * 3] of the rows of the cell [9], or
   NULL for both. */
void nbody_vectors(int64_t count, const int64_t* receiver, const int64_t* source, const double* positions,
                   const double* shift, const double* cell, double* vector);

#ifdef __cplusplus
}
#endif
#endif
