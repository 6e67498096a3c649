#include "pair_nbody.h"

#include "atom.h"
#include "comm.h"
#include "error.h"
#include "force.h"
#include "memory.h"
#include "neigh_list.h"
#include "neighbor.h"
#include "update.h"

#include <algorithm>
#include <cstring>
#include <numeric>
#include <stdexcept>
#include <unordered_map>

using namespace LAMMPS_NS;

PairNBody::PairNBody(LAMMPS *lmp) : Pair(lmp)
{
  single_enable = 0;
  restartinfo = 0;
  one_coeff = 1;
  manybody_flag = 1;
  ghostneigh = 1;
  no_virial_fdotr_compute = 1;
  centroidstressflag = CENTROID_NOTAVAIL;
}

PairNBody::~PairNBody()
{
  if (!allocated) return;
  memory->destroy(setflag);
  memory->destroy(cutsq);
  memory->destroy(cutghost);
}

void PairNBody::allocate()
{
  const int n = atom->ntypes + 1;
  memory->create(setflag, n, n, "pair:setflag");
  memory->create(cutsq, n, n, "pair:cutsq");
  memory->create(cutghost, n, n, "pair:cutghost");
  allocated = 1;
}

void PairNBody::settings(int narg, char **arg)
{
  if (narg) error->all(FLERR, "pair_style nbody takes no arguments, got '{}'; name the model in pair_coeff", arg[0]);
}

void PairNBody::coeff(int narg, char **arg)
{
  const int types = atom->ntypes;
  if (narg != 3 + types || strcmp(arg[0], "*") || strcmp(arg[1], "*"))
    error->all(FLERR,
               "pair_coeff of nbody must be '* * FOLDER' and an element for each of the {} atom types, got {} "
               "arguments; write for example: pair_coeff * * model_c O H",
               types, narg);
  try {
    library = std::make_unique<NBodyLibrary>(arg[2]);
  } catch (std::runtime_error &problem) {
    error->all(FLERR, "pair_coeff of nbody: {}", problem.what());
  }
  number_of_type.assign(types + 1, 0);
  for (int type = 1; type <= types; type++) {
    const char *symbol = arg[2 + type];
    const int number = atomic_number(symbol);
    if (!number)
      error->all(FLERR, "pair_coeff of nbody: elements must be symbols such as O, got '{}' for atom type {}{}", symbol,
                 type,
                 strcmp(symbol, "NULL") ? "" : "; the model must have all types, add other forces by hybrid/overlay");
    if (!library->knows(number))
      error->all(FLERR,
                 "pair_coeff of nbody: the model does not know the element {} of atom type {}; it knows {}; train it "
                 "on data with that element",
                 symbol, type, library->symbols());
    number_of_type[type] = number;
  }
  edges.assign(library->num_shells(), {});
  if (!allocated) allocate();
  for (int i = 1; i <= types; i++)
    for (int j = i; j <= types; j++) setflag[i][j] = 1;
}

void PairNBody::init_style()
{
  if (strcmp(update->unit_style, "metal"))
    error->all(FLERR,
               "pair_style nbody needs units metal (eV, angstrom, ps), got {}; begin the input with 'units metal'",
               update->unit_style);
  if (!force->newton_pair)
    error->all(FLERR,
               "pair_style nbody needs newton on for pairs, since forces on ghosts are returned; remove 'newton off'");
  if (offset_flag || tail_flag)
    error->all(FLERR, "pair_style nbody has no cutoff to correct, got pair_modify shift or tail yes; set both to no");
  if (comm->mode != Comm::SINGLE)
    error->all(FLERR,
               "pair_style nbody needs one ghost cutoff, got another comm_modify mode; use 'comm_modify mode single'");
  for (int i = 1; i < 4 && atom->molecular != Atom::ATOMIC; i++)
    if (force->special_lj[i] == 0.0 && force->special_coul[i] == 0.0)
      error->all(FLERR, "pair_style nbody needs the pairs of bonded atoms, but special_bonds excludes them; use "
                        "'special_bonds lj/coul 1 1 1'");
  /* The list for the largest shell; ghosts up to the sum of the radii, of which some need neighbors, too. */
  neighbor->add_request(this, NeighConst::REQ_FULL | NeighConst::REQ_GHOST);
  comm->cutghostuser = std::max(comm->cutghostuser, library->reach() + neighbor->skin);
}

double PairNBody::init_one(int i, int j)
{
  double largest = 0.0, before_last = 0.0;
  for (int k = 0; k < library->num_shells(); k++) {
    before_last = largest;
    largest = std::max(largest, library->cutoff(k));
  }
  cutghost[i][j] = cutghost[j][i] = before_last;
  return largest;
}

/* What is known only after the lists were made. */
void PairNBody::check_list() const
{
  if (neighbor->exclude || neighbor->includegroup)
    error->all(FLERR,
               "pair_style nbody needs all neighbors, got neigh_modify exclude or include; use 'exclude none' and "
               "'include all'");
  if (list->iskip)
    error->all(FLERR, "pair_style nbody must have all pairs of types, but hybrid gives some to another style; use "
                      "'pair_style hybrid/overlay', which adds both");
}

void PairNBody::find_images()
{
  const int nall = atom->nlocal + atom->nghost;
  std::unordered_map<tagint, int> found;
  first.resize(nall);
  for (int i = 0; i < nall; i++) first[i] = atom->tag_enable ? found.emplace(atom->tag[i], i).first->second : i;
}

/* The image of an atom whose state is computed for all of them. That of a ghost is the one that is needed first: it is
   near enough to local atoms to have all its neighbors here. */
int PairNBody::chosen_image(int i)
{
  int &image = chosen[first[i]];
  if (image < 0) image = i;
  return image;
}

/* Edges of each shell: from the last, whose receivers are the local atoms, to the first. A receiver of shell k needs
   the state of its sources in shell k - 1, and so their edges there. */
void PairNBody::find_edges()
{
  const int nall = atom->nlocal + atom->nghost, num_shells = library->num_shells();
  const double *const *x = atom->x;
  numbers.resize(nall);
  for (int i = 0; i < nall; i++) numbers[i] = number_of_type[atom->type[i]];
  needed.assign(nall, 0);
  std::fill_n(needed.begin(), atom->nlocal, num_shells);
  chosen.assign(nall, -1);
  std::iota(chosen.begin(), chosen.begin() + atom->nlocal, 0);

  for (int k = num_shells - 1; k >= 0; k--) {
    const double limit = library->cutoff(k) * library->cutoff(k);
    Edges &shell = edges[k];
    shell.receiver.clear();
    shell.source.clear();
    shell.vector.clear();
    for (int i = 0; i < nall; i++) {
      if (needed[i] <= k) continue;
      const int *neighbors = list->firstneigh[i];
      for (int n = 0; n < list->numneigh[i]; n++) {
        const int j = neighbors[n] & NEIGHMASK;
        const double v[3] = {x[j][0] - x[i][0], x[j][1] - x[i][1], x[j][2] - x[i][2]};
        if (v[0] * v[0] + v[1] * v[1] + v[2] * v[2] >= limit) continue;
        const int image = chosen_image(j);
        shell.receiver.push_back(i);
        shell.source.push_back(image);
        shell.vector.insert(shell.vector.end(), v, v + 3);
        needed[image] = std::max(needed[image], k);
      }
    }
  }
}

void PairNBody::compute(int eflag, int vflag)
{
  ev_init(eflag, vflag);
  check_list();
  if (vflag_atom)
    error->all(FLERR,
               "pair_style nbody has no virial per atom, but a compute asks for it, such as stress/atom; use the "
               "pressure of the box (compute pressure)");
  if (neighbor->ago == 0 || static_cast<int>(first.size()) != atom->nlocal + atom->nghost) find_images();
  find_edges();
  const int nlocal = atom->nlocal, nall = nlocal + atom->nghost;
  energies.resize(nlocal);
  forces.resize(3 * nall);
  std::vector<nbody_edges> shells;
  for (const Edges &e : edges)
    shells.push_back({static_cast<int64_t>(e.source.size()), e.receiver.data(), e.source.data(), e.vector.data()});

  double w[9];
  if (library->set_threads(library->model, comm->nthreads) ||
      library->compute(library->model, nall, nlocal, numbers.data(), shells.data(), energies.data(), forces.data(), w))
    error->one(FLERR,
               "pair_style nbody cannot compute forces: {}; check the positions of the atoms, or use more MPI ranks "
               "if memory is short",
               library->last_error());

  for (int i = 0; i < nall; i++)
    for (int a = 0; a < 3; a++) atom->f[i][a] += forces[3 * i + a];
  if (eflag_global)
    for (double energy : energies) eng_vdwl += energy;
  if (eflag_atom)
    for (int i = 0; i < nlocal; i++) eatom[i] += energies[i];
  if (vflag_global) {
    const int order[6] = {0, 4, 8, 1, 2, 5}; /* xx yy zz xy xz yz; LAMMPS' virial has the other sign */
    for (int a = 0; a < 6; a++) virial[a] -= w[order[a]];
  }
}

double PairNBody::memory_usage()
{
  double bytes = Pair::memory_usage();
  if (library) bytes += library->memory(library->model);
  for (const Edges &e : edges) bytes += 8.0 * (e.receiver.capacity() + e.source.capacity() + e.vector.capacity());
  return bytes + 8.0 * (numbers.capacity() + energies.capacity() + forces.capacity()) +
         4.0 * (needed.capacity() + first.capacity() + chosen.capacity());
}
