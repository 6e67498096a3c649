#include "nbody_library.h"

#include <cmath>
#include <dlfcn.h>
#include <sstream>
#include <stdexcept>
#include <sys/stat.h>
#include <vector>

static const std::vector<std::string> &all_symbols()
{
  static const std::vector<std::string> found = [] {
    std::istringstream text(
        "H He Li Be B C N O F Ne Na Mg Al Si P S Cl Ar K Ca Sc Ti V Cr Mn Fe Co Ni Cu Zn Ga Ge As Se Br Kr Rb Sr Y Zr "
        "Nb Mo Tc Ru Rh Pd Ag Cd In Sn Sb Te I Xe Cs Ba La Ce Pr Nd Pm Sm Eu Gd Tb Dy Ho Er Tm Yb Lu Hf Ta W Re Os Ir "
        "Pt Au Hg Tl Pb Bi Po At Rn Fr Ra Ac Th Pa U Np Pu Am Cm Bk Cf Es Fm Md No Lr Rf Db Sg Bh Hs Mt Ds Rg Cn Nh Fl "
        "Mc Lv Ts Og");
    std::vector<std::string> symbols;
    for (std::string symbol; text >> symbol;) symbols.push_back(symbol);
    return symbols;
  }();
  return found;
}

int atomic_number(const std::string &symbol)
{
  const auto &symbols = all_symbols();
  for (size_t i = 0; i < symbols.size(); i++)
    if (symbols[i] == symbol) return static_cast<int>(i) + 1;
  return 0;
}

template <class Function> static void find(void *handle, const char *name, Function &function)
{
  function = reinterpret_cast<Function>(dlsym(handle, name));
  if (!function)
    throw std::runtime_error(std::string("nbody_model.so has no function ") + name +
                             "; export the model again with this version of nbody_pyg and run make");
}

NBodyLibrary::NBodyLibrary(const std::string &folder)
{
  std::string library = folder + "/nbody_model.so";
  const std::string weights = folder + "/nbody_model.weights";
  if (library[0] != '/') library = "./" + library; /* a path, not a name to search for */
  struct stat unused;
  if (stat(library.c_str(), &unused))
    throw std::runtime_error("there is no file " + library + "; write it with: nbody export MODEL --to c --out " +
                             folder + " && make -C " + folder + " nbody_model.so");
  handle = dlopen(library.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (!handle)
    throw std::runtime_error("the library cannot be loaded: " + std::string(dlerror()) +
                             "; compile it on this machine: make -B -C " + folder + " nbody_model.so");
  try {
    decltype(&nbody_load) load;
    find(handle, "nbody_load", load);
    find(handle, "nbody_free", free);
    find(handle, "nbody_error", last_error);
    find(handle, "nbody_num_shells", num_shells);
    find(handle, "nbody_cutoff", cutoff);
    find(handle, "nbody_reach", reach);
    find(handle, "nbody_num_elements", num_elements);
    find(handle, "nbody_element", element);
    find(handle, "nbody_set_threads", set_threads);
    find(handle, "nbody_memory", memory);
    find(handle, "nbody_compute", compute);
    if (std::isinf(reach()))
      throw std::runtime_error("the model has latent charges, which act between all atoms, but a rank knows only the near "
                               "ones; take a model without long_range, or run this one with ASE or 'nbody md'");
    model = load(weights.c_str());
    if (!model)
      throw std::runtime_error("the weights " + weights + " cannot be used: " + last_error() +
                               "; export the model again and run make -B");
  } catch (...) {
    dlclose(handle);
    throw;
  }
}

NBodyLibrary::~NBodyLibrary()
{
  free(model);
  dlclose(handle);
}

bool NBodyLibrary::knows(int number) const
{
  for (int i = 0; i < num_elements(); i++)
    if (element(i) == number) return true;
  return false;
}

std::string NBodyLibrary::symbols() const
{
  std::string text;
  for (int i = 0; i < num_elements(); i++) text += (i ? " " : "") + all_symbols()[element(i) - 1];
  return text;
}
