/* How the compiler finds the functions of a stand-in for libcuda.so.1: by name, also by that of their second version. */
int cuGetProcAddress_v2(const char *symbol, void **function, int version, unsigned long long flags, int *status) {
  char versioned[128];
  snprintf(versioned, sizeof versioned, "%s_v2", symbol);
  *function = dlsym(RTLD_DEFAULT, symbol);
  if (!*function) *function = dlsym(RTLD_DEFAULT, versioned);
  if (status) *status = !*function;
  return *function ? SUCCESS : NOT_FOUND;
}
int cuGetProcAddress(const char *symbol, void **function, int version, unsigned long long flags) {
  int status;
  return cuGetProcAddress_v2(symbol, function, version, flags, &status);
}
