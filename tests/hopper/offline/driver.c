/* A stand-in for libcuda.so.1 that runs nothing: it answers what the Mosaic GPU compiler asks about the device, as an H100 would,
   so that kernels are compiled to machine code on a machine without a GPU. STAND_IN_CAPABILITY, such as 80, names another
   compute capability. */
#include <dlfcn.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>

enum { SUCCESS = 0, NOT_FOUND = 500 };
enum { MULTIPROCESSORS = 16, CAPABILITY_MAJOR = 75, CAPABILITY_MINOR = 76, SMEM_PER_SM = 81, SMEM_PER_BLOCK_OPTIN = 97 };
static void *const handle = (void *)1; /* any pointer that is not null */

static int capability(void) {
  const char *given = getenv("STAND_IN_CAPABILITY");
  return given ? atoi(given) : 90;
}

int cuInit(unsigned flags) { return SUCCESS; }
int cuDriverGetVersion(int *version) { return *version = 13000, SUCCESS; }
int cuDeviceGetCount(int *count) { return *count = 1, SUCCESS; }
int cuDeviceGet(int *device, int ordinal) { return *device = 0, SUCCESS; }
int cuCtxGetDevice(int *device) { return *device = 0, SUCCESS; }
int cuCtxGetCurrent(void **context) { return *context = handle, SUCCESS; }
int cuDeviceGetAttribute(int *value, int attribute, int device) {
  switch (attribute) {
    case CAPABILITY_MAJOR: *value = capability() / 10; break;
    case CAPABILITY_MINOR: *value = capability() % 10; break;
    case MULTIPROCESSORS: *value = 132; break;
    case SMEM_PER_SM: *value = 233472; break;
    case SMEM_PER_BLOCK_OPTIN: *value = 232448; break;
    default: *value = 0;
  }
  return SUCCESS;
}
int cuModuleLoadData(void **module, const void *image) { return *module = handle, SUCCESS; }
int cuModuleLoadDataEx(void **module, const void *image, unsigned n, void *options, void *values) { return *module = handle, SUCCESS; }
int cuModuleGetFunction(void **function, void *module, const char *name) { return *function = handle, SUCCESS; }
int cuModuleGetGlobal_v2(void **pointer, size_t *bytes, void *module, const char *name) {
  *pointer = NULL;
  if (bytes) *bytes = 0;
  return SUCCESS;
}
int cuModuleUnload(void *module) { return SUCCESS; }
int cuFuncSetAttribute(void *function, int attribute, int value) { return SUCCESS; }
int cuGetErrorName(int error, const char **name) { return *name = "OFFLINE", SUCCESS; }
int cuGetErrorString(int error, const char **text) { return *text = "the offline compiler has no device", SUCCESS; }

#include "proc_address.h"
