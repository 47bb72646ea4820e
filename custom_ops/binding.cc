// The Paddle operators of every kernel, in one translation unit: Paddle's headers are most of the compile time.
#include "paddle/extension.h"

#include "adamw/binding.h"
#include "cross_entropy/binding.h"
#include "decode_step/binding.h"
#include "elementwise/binding.h"
#include "flashmask_attention/binding.h"
#include "linear/binding.h"
#include "moe_ffn/binding.h"
#include "patch_embed/binding.h"
#include "rms_norm/binding.h"
#include "route/binding.h"
#include "swiglu/binding.h"
#include "uni_rope/binding.h"

// The exchange between processes uses Paddle's internal headers, which ask a build with CUDA for those of cuBLAS. It
// serves the CPU; without it processes exchange rows through Paddle's own collectives.
#if !defined(PADDLE_WITH_CUDA) || __has_include(<cublas_v2.h>)
#include "exchange/binding.h"
#endif
