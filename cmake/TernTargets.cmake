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

# Sanitizer builds read the headers that nearly every file includes only once, which takes a fifth of the processor time off them. Others do
# not: they share their objects through ccache, and show where an #include is missing.
option(TERN_PRECOMPILE "Precompile headers of the standard library, of fmt and of GoogleTest" OFF)
set(TERN_PRECOMPILED_HEADERS <algorithm> <atomic> <chrono> <functional> <memory> <mutex> <span> <stdexcept> <string> <thread> <vector> <fmt/format.h>)

# tern_precompiled(NAME LIBRARY|PROGRAM HEADER...): headers for tern_precompile(TARGET NAME), whose TARGET is of the same kind: programs are
# compiled with -fPIE.
function(tern_precompiled name kind)
  if(NOT TERN_PRECOMPILE)
    return()
  endif()
  set(source ${PROJECT_BINARY_DIR}/${name}.cc)
  file(CONFIGURE OUTPUT ${source} CONTENT "int main() {}\n" @ONLY)
  if(kind STREQUAL "PROGRAM")
    add_executable(${name} ${source})
  else()
    add_library(${name} OBJECT ${source})
  endif()
  target_link_libraries(${name} PRIVATE tern_flags fmt::fmt)
  target_compile_options(${name} PRIVATE -fpch-preprocess)  # for ccache
  target_precompile_headers(${name} PRIVATE ${ARGN})
endfunction()
function(tern_precompile target name)
  if(TERN_PRECOMPILE)
    target_precompile_headers(${target} REUSE_FROM ${name})
    target_compile_options(${target} PRIVATE -fpch-preprocess)
  endif()
endfunction()
tern_precompiled(tern_precompiled_library LIBRARY ${TERN_PRECOMPILED_HEADERS})

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
    tern_precompile(tern_${name} tern_precompiled_library)
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
