/* Entry of the plugin: tells LAMMPS of the pair style "nbody". */
#include "lammps.h"
#include "pair_nbody.h"

/* The interface of lammpsplugin.h, which installed versions of LAMMPS do not have. */
extern "C" {
typedef struct {
  const char *version, *style, *name, *info, *author;
  union {
    void *(*one)(void *);
    void *(*two)(void *, int, char **);
  } creator;
  void *handle;
} lammpsplugin_t;
typedef void (*lammpsplugin_regfunc)(lammpsplugin_t *, void *);

__attribute__((visibility("default"))) void lammpsplugin_init(void *lammps, void *handle, void *register_plugin)
{
  lammpsplugin_t plugin = {};
  plugin.version = LAMMPS_VERSION;
  plugin.style = "pair";
  plugin.name = "nbody";
  plugin.info = "N-body networks of nbody_pyg";
  plugin.author = "nbody_pyg contributors";
  plugin.creator.one = [](void *lmp) -> void * {
    return new LAMMPS_NS::PairNBody(static_cast<LAMMPS_NS::LAMMPS *>(lmp));
  };
  plugin.handle = handle;
  reinterpret_cast<lammpsplugin_regfunc>(register_plugin)(&plugin, lammps);
}
}
