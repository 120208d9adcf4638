// libcuda.so.1: nothing of its own; it needs the library that has the driver's functions, so that dlsym finds them.
int standin_is_loaded;
