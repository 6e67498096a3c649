/* pair_style nbody: an N-body network of nbody_pyg, exported as a C program, with domain decomposition.

   A rank computes the energies of its own atoms. An atom feels others up to the sum of the radii of the shells, so
   ghosts are communicated up to there, and LAMMPS adds the forces on ghosts to those of their owners. Of several
   images of an atom one is computed, since they have the same state. */
#ifndef LMP_PAIR_NBODY_H
#define LMP_PAIR_NBODY_H

#include "nbody_library.h"
#include "pair.h"

#include <memory>
#include <vector>

namespace LAMMPS_NS
{

class PairNBody : public Pair
{
 public:
  explicit PairNBody(LAMMPS *);
  ~PairNBody() override;

  void settings(int, char **) override;
  void coeff(int, char **) override;
  void init_style() override;
  double init_one(int, int) override;
  void compute(int, int) override;
  double memory_usage() override;

 private:
  struct Edges { /* of one shell, as in nbody_edges */
    std::vector<int64_t> receiver, source;
    std::vector<double> vector;
  };
  void allocate();
  void check_list() const;
  void find_images();
  int chosen_image(int);
  void find_edges();

  std::unique_ptr<NBodyLibrary> library;
  std::vector<int64_t> number_of_type, numbers; /* atomic numbers of types, and of local and ghost atoms */
  std::vector<int> first;  /* for atoms and ghosts: the first one with the same tag, a local one if there is any */
  std::vector<int> chosen; /* of that first one: the image that is computed, or -1 */
  std::vector<int> needed; /* the number of shells in which the state of an atom is needed */
  std::vector<Edges> edges;
  std::vector<double> energies, forces;
};

} // namespace LAMMPS_NS

#endif
