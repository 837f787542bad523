// SPDX-License-Identifier: Apache-2.0
// The elements of rows as floats and back, 16 bytes at a time. Bit for bit what base/numeric.h does on the host; tests compare them.
#pragma once

#include <cuda_fp16.h>
#include <tern/tern.h>

#include <cstddef>
#include <cstdint>

#include "base/numeric.h"

namespace tern::device {

// 16 bytes of a row.
struct alignas(16) Vec16 {
  uint32_t words[4];
};
// In one access: where the words are used one by one, the compiler makes four of a plain copy.
__device__ __forceinline__ Vec16 load_vec16(const std::byte* from) {
  const uint4 v = *reinterpret_cast<const uint4*>(from);
  return {{v.x, v.y, v.z, v.w}};
}
// Of memory that others may write meanwhile; each word is as somebody wrote it.
__device__ __forceinline__ Vec16 load_vec16_relaxed_sys(const std::byte* from) {
  Vec16 v;
  asm volatile("ld.relaxed.sys.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.words[0]), "=r"(v.words[1]), "=r"(v.words[2]), "=r"(v.words[3])
               : "l"(from)
               : "memory");
  return v;
}
// The same if `wanted`, and zeros if not. Without a branch: the compiler puts what is done with a load that has one behind it, before the next load,
// and then they are not under way together.
__device__ __forceinline__ Vec16 load_vec16_relaxed_sys_if(bool wanted, const std::byte* from) {
  Vec16 v = {};
  asm volatile("{ .reg .pred wanted; setp.ne.u32 wanted, %5, 0; @wanted ld.relaxed.sys.global.v4.u32 {%0, %1, %2, %3}, [%4]; }"
               : "+r"(v.words[0]), "+r"(v.words[1]), "+r"(v.words[2]), "+r"(v.words[3])
               : "l"(from), "r"(static_cast<uint32_t>(wanted))
               : "memory");
  return v;
}
// Of global memory that is read once: it takes no room in the SM's cache.
__device__ __forceinline__ Vec16 load_vec16_once(const std::byte* from) {
  Vec16 v;
  asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.words[0]), "=r"(v.words[1]), "=r"(v.words[2]), "=r"(v.words[3])
               : "l"(from)
               : "memory");
  return v;
}

struct Bf16 {
  static constexpr int kElements = 8;  // in a Vec16
  __device__ static void widen(const Vec16& v, float (&out)[kElements]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      out[2 * i] = __uint_as_float(v.words[i] << 16);
      out[2 * i + 1] = __uint_as_float(v.words[i] & 0xffff0000u);
    }
  }
  __device__ static Vec16 narrow(const float (&in)[kElements]) {
    Vec16 v;
#pragma unroll
    for (int i = 0; i < 4; ++i) asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(v.words[i]) : "f"(in[2 * i + 1]), "f"(in[2 * i]));
    return v;
  }
};

struct F16 {
  static constexpr int kElements = 8;
  __device__ static void widen(const Vec16& v, float (&out)[kElements]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      asm("{\n .reg .f16 l, h;\n mov.b32 {l, h}, %2;\n cvt.f32.f16 %0, l;\n cvt.f32.f16 %1, h;\n}"
          : "=f"(out[2 * i]), "=f"(out[2 * i + 1])
          : "r"(v.words[i]));
    }
  }
  __device__ static Vec16 narrow(const float (&in)[kElements]) {
    Vec16 v;
#pragma unroll
    for (int i = 0; i < 4; ++i) asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(v.words[i]) : "f"(in[2 * i + 1]), "f"(in[2 * i]));
    return v;
  }
};

struct F32 {
  static constexpr int kElements = 4;
  __device__ static void widen(const Vec16& v, float (&out)[kElements]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) out[i] = __uint_as_float(v.words[i]);
  }
  __device__ static Vec16 narrow(const float (&in)[kElements]) {
    Vec16 v;
#pragma unroll
    for (int i = 0; i < 4; ++i) v.words[i] = __float_as_uint(in[i]);
    return v;
  }
};

// Two floats as fp8 e4m3, the first in the low byte: to nearest even, saturated to 448.
__device__ __forceinline__ uint16_t narrow_e4m3x2(float low, float high) {
#if __CUDA_ARCH__ >= 890
  uint16_t result;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(result) : "f"(high), "f"(low));
  return result;
#else
  return static_cast<uint16_t>(f32_to_e4m3(low) | f32_to_e4m3(high) << 8);
#endif
}

// The scale of a block of channels for a cast to fp8, from the largest magnitude of its values (at least 1e-4).
struct BlockScale {
  float multiplier;  // of the values
  uint32_t stored;   // a float's bits, or a biased exponent
};
__device__ __forceinline__ BlockScale scale_of(float amax, int encoding) {
  const float scale = __fmul_rn(amax, 1.0f / kE4m3Max);
  if (encoding == TERN_ENCODING_FP8_F32) return {__fdiv_rn(kE4m3Max, amax), __float_as_uint(scale)};
  const uint32_t exponent = round_up_to_ue8m0(scale);
  const float multiplier = exponent == 255 ? 0.0f : __uint_as_float((254 - exponent) << 23);
  return {multiplier, encoding == TERN_ENCODING_FP8_UE8M0 ? exponent : exponent << 23};
}

// Calls function(Wire()) for the type of the elements.
template <typename Function>
__device__ __forceinline__ void with_wire_type(int dtype, Function function) {
  if (dtype == TERN_DTYPE_BF16)
    function(Bf16());
  else if (dtype == TERN_DTYPE_FP16)
    function(F16());
  else
    function(F32());
}

}  // namespace tern::device
