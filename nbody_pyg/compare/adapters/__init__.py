"""One module for each package of peers; the package itself is imported when a model of it is built."""
