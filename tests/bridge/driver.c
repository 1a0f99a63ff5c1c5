/* A stand-in for libcuda.so.1 with two GPUs like an H200, that runs nothing. It answers what the Mosaic GPU compiler
   asks, captures launches into graphs and gives their parameters back, and writes every other launch, memset and context as a
   line of JSON to the file that STANDIN_LOG names. It refuses what the driver refuses: a launch without a context, or in another
   than the module's, with too few parameters, or with a cubin that is none.
   Sizes of parameters are read from the cubin: section .nv.info.KERNEL, attribute KPARAM_INFO. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <elf.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { SUCCESS = 0, INVALID_VALUE = 1, INVALID_DEVICE = 101, INVALID_IMAGE = 200, INVALID_CONTEXT = 201, INVALID_HANDLE = 400,
       NOT_FOUND = 500 };
enum { MULTIPROCESSORS = 16, CAPABILITY_MAJOR = 75, CAPABILITY_MINOR = 76, SMEM_PER_SM = 81, SMEM_PER_BLOCK_OPTIN = 97 };
enum { SMEM = 8, NON_PORTABLE = 14 };  /* CUfunction_attribute */
enum { CLUSTER = 4, PORTABLE = 8 };    /* CUlaunchAttributeID; blocks of a cluster that need no permission */
enum { MAX_PARAMETERS = 64, CAPACITY = 4096, NUM_DEVICES = 2, FOR_CUDA = 190, KPARAM_INFO = 0x17, SIZED = 4 };

typedef struct { int device, retained; } Context;
typedef struct { Context *context; char *image; } Module;
typedef struct { Module *module; char name[256]; int smem, non_portable, count, offsets[MAX_PARAMETERS], sizes[MAX_PARAMETERS]; } Function;
typedef struct { Function *function; unsigned grid[3], block[3], smem, cluster[3]; unsigned char block_of[CAPACITY]; void *pointers[MAX_PARAMETERS]; } Node;
typedef struct { int count; Node nodes[8]; } Graph;
typedef struct { Context *context; Graph *captured; } Stream;
typedef struct { void *function; unsigned grid[3], block[3], smem; void **parameters, **extra; void *kernel, *context; } NodeParameters;
typedef struct { int id; unsigned padding, value[16]; } Attribute;
typedef struct { unsigned grid[3], block[3], smem; void *stream; Attribute *attributes; unsigned num_attributes; } Config;

static Context contexts[NUM_DEVICES] = {{0, 0}, {1, 0}};
static Stream *streams[256];
static __thread Context *current;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

static void note(const char *text) {
  const char *path = getenv("STANDIN_LOG");
  if (!path) return;
  pthread_mutex_lock(&lock);
  FILE *file = fopen(path, "a");
  fputs(text, file);
  fclose(file);
  pthread_mutex_unlock(&lock);
}

static int capability(void) {
  const char *given = getenv("STAND_IN_CAPABILITY");
  return given ? atoi(given) : 90;
}

int cuInit(unsigned flags) { return SUCCESS; }
int cuDriverGetVersion(int *version) { return *version = 13000, SUCCESS; }
int cuDeviceGetCount(int *count) { return *count = NUM_DEVICES, SUCCESS; }
int cuDeviceGet(int *device, int ordinal) {
  return ordinal < 0 || ordinal >= NUM_DEVICES ? INVALID_DEVICE : (*device = ordinal, SUCCESS);
}
int cuDevicePrimaryCtxRetain(void **context, int device) {
  contexts[device].retained++;
  return *context = &contexts[device], SUCCESS;
}
int cuCtxGetDevice(int *device) { return current ? (*device = current->device, SUCCESS) : INVALID_CONTEXT; }
int cuCtxGetCurrent(void **context) { return *context = current, SUCCESS; }
int cuCtxSetCurrent(void *context) { return current = context, SUCCESS; }
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
int cuGetErrorName(int error, const char **name) { return *name = "STANDIN", SUCCESS; }
int cuGetErrorString(int error, const char **text) { return *text = "the stand-in driver refuses", SUCCESS; }

/* -- modules -- */

static Elf64_Shdr *sections_of(const char *image) { return (Elf64_Shdr *)(image + ((Elf64_Ehdr *)image)->e_shoff); }
static Elf64_Shdr *section(const char *image, const char *name) {
  Elf64_Ehdr *head = (Elf64_Ehdr *)image;
  Elf64_Shdr *all = sections_of(image);
  const char *names = image + all[head->e_shstrndx].sh_offset;
  for (int i = 0; i < head->e_shnum; i++)
    if (!strcmp(names + all[i].sh_name, name)) return &all[i];
  return NULL;
}
int cuModuleLoadData(void **found, const void *image) {
  const Elf64_Ehdr *head = image;
  if (!current) return INVALID_CONTEXT;
  if (memcmp(image, ELFMAG, 4) || head->e_machine != FOR_CUDA) return INVALID_IMAGE;
  size_t size = head->e_shoff + head->e_shnum * head->e_shentsize, programs = head->e_phoff + head->e_phnum * head->e_phentsize;
  size = size > programs ? size : programs;
  Module *module = calloc(1, sizeof *module);
  module->context = current;
  module->image = malloc(size);
  memcpy(module->image, image, size);
  char line[100];
  snprintf(line, sizeof line, "{\"loaded\": %d}\n", current->device);
  note(line);
  return *found = module, SUCCESS;
}
int cuModuleLoadDataEx(void **module, const void *image, unsigned n, void *options, void *values) {
  return cuModuleLoadData(module, image);
}
int cuModuleUnload(void *found) {
  Module *module = found;
  char line[100];
  snprintf(line, sizeof line, "{\"unloaded\": %d}\n", module->context->device);
  note(line);
  free(module->image);
  free(module);
  return SUCCESS;
}
int cuModuleGetFunction(void **found, void *given, const char *name) {
  Module *module = given;
  char info[300];
  snprintf(info, sizeof info, ".nv.info.%s", name);
  Elf64_Shdr *place = section(module->image, info);
  if (!place) return NOT_FOUND;
  Function *function = calloc(1, sizeof *function);
  function->module = module;
  snprintf(function->name, sizeof function->name, "%s", name);
  const unsigned char *at = (unsigned char *)module->image + place->sh_offset, *end = at + place->sh_size;
  while (at < end) {
    uint16_t size = at[0] == SIZED ? *(uint16_t *)(at + 2) : 0;
    if (at[1] == KPARAM_INFO) {
      uint16_t ordinal = *(uint16_t *)(at + 8);
      if (ordinal >= MAX_PARAMETERS) return INVALID_VALUE;
      function->offsets[ordinal] = *(uint16_t *)(at + 10);
      function->sizes[ordinal] = *(uint32_t *)(at + 12) >> 18;
      function->count = ordinal >= function->count ? ordinal + 1 : function->count;
    }
    at += 4 + size;
  }
  return *found = function, SUCCESS;
}
int cuModuleGetGlobal_v2(void **pointer, size_t *bytes, void *module, const char *name) {
  *pointer = NULL;
  if (bytes) *bytes = 0;
  return SUCCESS;
}
int cuFuncSetAttribute(void *function, int attribute, int value) {
  if (attribute == SMEM) ((Function *)function)->smem = value;
  if (attribute == NON_PORTABLE) ((Function *)function)->non_portable = value;
  return SUCCESS;
}
int cuFuncGetName(const char **name, void *function) { return *name = ((Function *)function)->name, SUCCESS; }
int cuFuncGetParamInfo(void *given, size_t i, size_t *offset, size_t *size) {
  Function *function = given;
  if (i >= (size_t)function->count) return INVALID_VALUE;
  return *offset = function->offsets[i], *size = function->sizes[i], SUCCESS;
}

/* -- streams and graphs -- */

static Stream *known(void *stream) {
  for (int i = 0; i < 256; i++)
    if (streams[i] == stream) return stream;
  return NULL;
}
int cuStreamCreate(void **found, unsigned flags) {
  if (!current) return INVALID_CONTEXT;
  Stream *stream = calloc(1, sizeof *stream);
  stream->context = current;
  for (int i = 0; i < 256; i++)
    if (!streams[i]) return streams[i] = stream, *found = stream, SUCCESS;
  return INVALID_VALUE;
}
int cuStreamDestroy_v2(void *stream) {
  for (int i = 0; i < 256; i++)
    if (streams[i] == stream) streams[i] = NULL;
  free(stream);
  return SUCCESS;
}
int cuStreamBeginCapture_v2(void *stream, int mode) {
  if (!known(stream)) return INVALID_HANDLE;
  ((Stream *)stream)->captured = calloc(1, sizeof(Graph));
  return SUCCESS;
}
int cuStreamEndCapture(void *stream, void **graph) {
  *graph = ((Stream *)stream)->captured;
  ((Stream *)stream)->captured = NULL;
  return SUCCESS;
}
int cuGraphGetNodes(void *given, void **nodes, size_t *count) {
  Graph *graph = given;
  for (size_t i = 0; nodes && i < *count && i < (size_t)graph->count; i++) nodes[i] = &graph->nodes[i];
  return *count = graph->count, SUCCESS;
}
int cuGraphNodeGetType(void *node, int *kind) { return *kind = 0, SUCCESS; }
int cuGraphKernelNodeGetAttribute(void *node, int attribute, void *value) {
  memset(value, 0, 64);
  if (attribute == CLUSTER) memcpy(value, ((Node *)node)->cluster, sizeof ((Node *)node)->cluster);
  return SUCCESS;
}
int cuGraphKernelNodeGetParams_v2(void *given, NodeParameters *found) {
  Node *node = given;
  memset(found, 0, sizeof *found);
  found->function = node->function;
  memcpy(found->grid, node->grid, sizeof node->grid);
  memcpy(found->block, node->block, sizeof node->block);
  found->smem = node->smem;
  for (int i = 0; i < node->function->count; i++) node->pointers[i] = node->block_of + node->function->offsets[i];
  return found->parameters = node->pointers, SUCCESS;
}
int cuGraphDestroy(void *graph) { return free(graph), SUCCESS; }

/* -- launches -- */

static int fill(Function *function, void **parameters, void **extra, unsigned char *block, int *size) {
  *size = 0;
  for (int i = 0; i < function->count; i++) {
    int end = function->offsets[i] + function->sizes[i];
    *size = end > *size ? end : *size;
  }
  if (*size > CAPACITY) return INVALID_VALUE;
  if (parameters) {
    for (int i = 0; i < function->count; i++) memcpy(block + function->offsets[i], parameters[i], function->sizes[i]);
  } else {
    if (!extra || (uintptr_t)extra[0] != 1 || (uintptr_t)extra[2] != 2 || extra[4]) return INVALID_VALUE;
    size_t given = *(size_t *)extra[3];
    if (given < (size_t)*size || given > CAPACITY) return INVALID_VALUE;
    memcpy(block, extra[1], given);
    *size = given;
  }
  return SUCCESS;
}
int cuLaunchKernelEx(const Config *config, void *given, void **parameters, void **extra) {
  Function *function = given;
  Stream *stream = known(config->stream);
  if (!current) return INVALID_CONTEXT;
  if (function->module->context != current) return INVALID_HANDLE;
  if ((int)config->smem > function->smem && config->smem > 49152) return INVALID_VALUE;
  Node node = {.function = function, .smem = config->smem};
  memcpy(node.grid, config->grid, sizeof node.grid);
  memcpy(node.block, config->block, sizeof node.block);
  for (unsigned i = 0; i < config->num_attributes; i++)
    if (config->attributes[i].id == CLUSTER) memcpy(node.cluster, config->attributes[i].value, sizeof node.cluster);
  if (node.cluster[0] * node.cluster[1] * node.cluster[2] > PORTABLE && !function->non_portable) return INVALID_VALUE;
  int size, code = fill(function, parameters, extra, node.block_of, &size);
  if (code) return code;
  if (stream && stream->captured) {
    if (stream->captured->count == 8) return INVALID_VALUE;
    stream->captured->nodes[stream->captured->count++] = node;
    return SUCCESS;
  }
  if (!getenv("STANDIN_LOG")) return SUCCESS;
  char *line = malloc(2 * CAPACITY + 1000), *at = line;
  at += sprintf(at, "{\"launched\": \"%s\", \"device\": %d, \"stream\": %llu, \"grid\": [%u, %u, %u], \"block\": [%u, %u, %u], "
                "\"smem_bytes\": %u, \"cluster\": [%u, %u, %u], \"parameters\": \"", function->name, current->device, (unsigned long long)config->stream,
                node.grid[0], node.grid[1], node.grid[2], node.block[0], node.block[1], node.block[2], node.smem,
                node.cluster[0], node.cluster[1], node.cluster[2]);
  for (int i = 0; i < size; i++) at += sprintf(at, "%02x", node.block_of[i]);
  strcpy(at, "\"}\n");
  note(line);
  free(line);
  return SUCCESS;
}
int cuLaunchKernel(void *function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz, unsigned smem,
                   void *stream, void **parameters, void **extra) {
  Config config = {{gx, gy, gz}, {bx, by, bz}, smem, stream, NULL, 0};
  return cuLaunchKernelEx(&config, function, parameters, extra);
}
int cuMemsetD8Async(unsigned long long address, unsigned char value, size_t count, void *stream) {
  char line[200];
  snprintf(line, sizeof line, "{\"filled\": %llu, \"value\": %u, \"bytes\": %zu}\n", address, value, count);
  note(line);
  return current ? SUCCESS : INVALID_CONTEXT;
}

/* A tensor map as it is here: the address is word 0, as in the driver's, and the rest holds what describes the array. */
int cuTensorMapEncodeTiled(uint64_t *map, int type, uint32_t rank, void *address, const uint64_t *sizes, const uint64_t *strides,
                           const uint32_t *box, const uint32_t *element_strides, int interleave, int swizzle, int l2, int fill) {
  if ((uintptr_t)address % 16 || rank < 1 || rank > 5) return INVALID_VALUE;
  memset(map, 0, 128);
  map[0] = (uintptr_t)address;
  map[1] = type | rank << 8 | swizzle << 16 | interleave << 24;
  for (uint32_t i = 0; i < rank; i++) map[2 + i] = sizes[i];
  for (uint32_t i = 0; i + 1 < rank; i++) map[7 + i] = strides[i];
  for (uint32_t i = 0; i < rank; i++) ((uint32_t *)map)[22 + i] = box[i];
  return SUCCESS;
}

#include "../hopper/offline/proc_address.h"
