// The Paddle operators of every kernel, in one translation unit: Paddle's headers are most of the compile time.
#include "paddle/extension.h"

#include "adamw/binding.h"
#include "cross_entropy/binding.h"
#include "decode_step/binding.h"
#include "exchange/binding.h"
#include "flashmask_attention/binding.h"
#include "linear/binding.h"
#include "moe_ffn/binding.h"
#include "patch_embed/binding.h"
#include "rms_norm/binding.h"
#include "route/binding.h"
#include "uni_rope/binding.h"
