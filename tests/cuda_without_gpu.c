/* libcuda.so.1, the driver, of a machine without a GPU: what cuDNN asks of it while it compiles plans for absent ones.
 *
 * A compiled module "loads", its functions have no attributes, and whatever would touch a device says that there is
 * none, so that no plan is ever run. Callers pass more arguments than are declared; C's calling conventions allow it.
 */
enum { SUCCESS = 0, NO_DEVICE = 100, CUDA = 12090 };

static int something;

#define GIVES(name, type, value) int name(type *out) { *out = (value); return SUCCESS; }
#define DOES_NOTHING(name) int name(void) { return SUCCESS; }
#define HAS_NO_DEVICE(name) int name(void) { return NO_DEVICE; }

GIVES(cuDriverGetVersion, int, CUDA)
GIVES(cuModuleLoadData, void *, &something)
GIVES(cuModuleGetFunction, void *, &something)
GIVES(cuLibraryLoadData, void *, &something)
GIVES(cuLibraryLoadFromFile, void *, &something)
GIVES(cuLibraryGetKernel, void *, &something)
GIVES(cuKernelGetFunction, void *, &something)
GIVES(cuKernelGetAttribute, int, 0)
GIVES(cuFuncGetAttribute, int, 0)

DOES_NOTHING(cuModuleUnload)
DOES_NOTHING(cuLibraryUnload)
DOES_NOTHING(cuKernelSetAttribute)
DOES_NOTHING(cuFuncSetAttribute)

HAS_NO_DEVICE(cuGetErrorName)
HAS_NO_DEVICE(cuGetErrorString)
HAS_NO_DEVICE(cuDeviceGet)
HAS_NO_DEVICE(cuDeviceGetCount)
HAS_NO_DEVICE(cuCtxGetCurrent)
HAS_NO_DEVICE(cuCtxGetLimit)
HAS_NO_DEVICE(cuCtxPopCurrent)
HAS_NO_DEVICE(cuCtxPushCurrent)
HAS_NO_DEVICE(cuStreamGetCtx)
HAS_NO_DEVICE(cuLinkCreate)
HAS_NO_DEVICE(cuLinkAddData)
HAS_NO_DEVICE(cuLinkComplete)
HAS_NO_DEVICE(cuLinkDestroy)
HAS_NO_DEVICE(cuLaunchKernel)
HAS_NO_DEVICE(cuLaunchKernelEx)
HAS_NO_DEVICE(cuLaunchCooperativeKernel)
HAS_NO_DEVICE(cuOccupancyMaxPotentialClusterSize)
HAS_NO_DEVICE(cuTensorMapEncodeIm2col)
HAS_NO_DEVICE(cuTensorMapEncodeTiled)
