/* A model exported by "nbody export MODEL --to c", loaded from its folder. */
#ifndef NBODY_LIBRARY_H
#define NBODY_LIBRARY_H

#include "nbody_model.h"

#include <string>

class NBodyLibrary
{
 public:
  /* Load nbody_model.so and nbody_model.weights. Throws std::runtime_error with cause and cure. */
  explicit NBodyLibrary(const std::string &folder);
  ~NBodyLibrary();
  NBodyLibrary(const NBodyLibrary &) = delete;
  NBodyLibrary &operator=(const NBodyLibrary &) = delete;

  bool knows(int atomic_number) const;
  std::string symbols() const; /* of the elements of the model */

  decltype(&nbody_free) free;
  decltype(&nbody_error) last_error;
  decltype(&nbody_num_shells) num_shells;
  decltype(&nbody_cutoff) cutoff;
  decltype(&nbody_reach) reach;
  decltype(&nbody_set_threads) set_threads;
  decltype(&nbody_memory) memory;
  decltype(&nbody_compute) compute;
  nbody_model *model = nullptr;

 private:
  decltype(&nbody_num_elements) num_elements;
  decltype(&nbody_element) element;
  void *handle = nullptr;
};

/* Atomic number of a symbol such as "O"; 0: there is no such element. */
int atomic_number(const std::string &symbol);

#endif
