# SPDX-License-Identifier: Apache-2.0
# One target for each folder of src/. A folder sees the headers of the folders it names in DEPS and no others: each
# target's include path is a directory of its own that holds one link to its folder, so `#include "base/error.h"`
# compiles only in a target that depends on base.

find_package(Threads REQUIRED)
find_package(fmt REQUIRED)

add_library(tern_flags INTERFACE)
target_compile_options(tern_flags INTERFACE
  $<$<COMPILE_LANGUAGE:C,CXX>:-Wall -Wextra -Wshadow -Wconversion -Wno-sign-conversion -Werror=return-type
  # The order and rounding of sums is part of the contract: no multiply-add may be formed behind our back.
  -ffp-contract=off>)
if(TERN_SANITIZE)
  target_compile_options(tern_flags INTERFACE
    $<$<COMPILE_LANGUAGE:C,CXX>:-fsanitize=${TERN_SANITIZE} -fno-omit-frame-pointer -fno-sanitize-recover=all>)
  target_link_options(tern_flags INTERFACE -fsanitize=${TERN_SANITIZE})
endif()
if(TERN_BUILD_FUZZ)
  if(NOT CMAKE_CXX_COMPILER_ID STREQUAL "Clang")
    message(FATAL_ERROR "TERN_BUILD_FUZZ needs clang++ (CMAKE_CXX_COMPILER); found ${CMAKE_CXX_COMPILER_ID}")
  endif()
  # The library tells the fuzzer where it has been.
  target_compile_options(tern_flags INTERFACE $<$<COMPILE_LANGUAGE:C,CXX>:-fsanitize=fuzzer-no-link>)
  target_link_options(tern_flags INTERFACE -fsanitize=fuzzer-no-link)
endif()

# tern_folder(NAME [SOURCES file...] [DEPS folder...] [LINK library...])
function(tern_folder name)
  cmake_parse_arguments(ARG "" "" "SOURCES;DEPS;LINK" ${ARGN})
  set(include_dir ${PROJECT_BINARY_DIR}/include/${name})
  file(MAKE_DIRECTORY ${include_dir})
  file(CREATE_LINK ${CMAKE_CURRENT_SOURCE_DIR} ${include_dir}/${name} SYMBOLIC)
  list(TRANSFORM ARG_DEPS PREPEND tern_)
  if(ARG_SOURCES)
    add_library(tern_${name} STATIC ${ARG_SOURCES})
    target_include_directories(tern_${name} PUBLIC ${include_dir})
    target_link_libraries(tern_${name} PUBLIC ${ARG_DEPS} PRIVATE tern_flags ${ARG_LINK})
  else()
    add_library(tern_${name} INTERFACE)
    target_include_directories(tern_${name} INTERFACE ${include_dir})
    target_link_libraries(tern_${name} INTERFACE ${ARG_DEPS} ${ARG_LINK})
  endif()
endfunction()

if(TERN_WITH_CUDA)
  # For all that uses CUDA: its headers, the static runtime, and how kernels are compiled. Arithmetic is IEEE's, product and
  # sum rounded separately, so that sums have the same bits as on the CPU.
  add_library(tern_cuda_flags INTERFACE)
  target_compile_options(tern_cuda_flags INTERFACE
    $<$<COMPILE_LANGUAGE:CUDA>:-Xcompiler=-Wall,-Wextra -Werror=cross-execution-space-call --expt-relaxed-constexpr
    -fmad=false -prec-div=true -prec-sqrt=true -ftz=false>)
  target_link_libraries(tern_cuda_flags INTERFACE CUDA::cudart_static)
endif()

# tern_cuda_folder(NAME [SOURCES file...] [DEPS folder...] [LINK library...]): a folder whose sources, .cu or .cc, use CUDA. The
# driver's library is never linked: what is needed of it is asked of the runtime, so that one binary runs on every machine.
function(tern_cuda_folder name)
  tern_folder(${name} ${ARGN})
  get_target_property(type tern_${name} TYPE)
  if(type STREQUAL "INTERFACE_LIBRARY")
    target_link_libraries(tern_${name} INTERFACE tern_cuda_flags)
  else()
    target_link_libraries(tern_${name} PUBLIC tern_cuda_flags)
  endif()
endfunction()

# tern_export_only_abi(TARGET): a shared library that exports the functions of tern.h, under the version node TERN_0, and
# nothing else. Hidden visibility alone would let templates of the standard library through.
function(tern_export_only_abi target)
  set(map ${PROJECT_SOURCE_DIR}/cmake/tern.map)
  target_link_options(${target} PRIVATE LINKER:--version-script=${map})
  set_property(TARGET ${target} APPEND PROPERTY LINK_DEPENDS ${map})
endfunction()
