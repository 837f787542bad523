# SPDX-License-Identifier: Apache-2.0
# Decides whether the CUDA engine is built, and starts the CUDA language if so. Sets TERN_WITH_CUDA.
#
#   cmake -B build -DTERN_CUDA=ON -DTERN_CUDA_ARCHS=90a     # one architecture builds four times faster
#
# The compiler is CMAKE_CUDA_COMPILER if given, else CUDACXX of the environment, else the nvcc in CUDA_HOME or CUDA_PATH, on the
# path, or in /usr/local/cuda. Nothing of CUDA but the driver is needed on the machine that runs the result.

set(TERN_CUDA AUTO CACHE STRING "Build the CUDA engine: ON, OFF, or AUTO: if nvcc is found")
set_property(CACHE TERN_CUDA PROPERTY STRINGS AUTO ON OFF)
set(TERN_CUDA_ARCHS "80;90a;100;120" CACHE STRING "GPU architectures to compile for; newer GPUs translate the last one at load time")

set(TERN_WITH_CUDA OFF)
if(NOT TERN_CUDA MATCHES "^(AUTO|ON|OFF)$")
  message(FATAL_ERROR "TERN_CUDA is \"${TERN_CUDA}\"; it must be AUTO, ON or OFF")
endif()
if(TERN_CUDA STREQUAL "OFF")
  return()
endif()

if(NOT CMAKE_CUDA_COMPILER)
  set(named $ENV{CUDACXX})
  if(NOT named)
    set(named nvcc)
  endif()
  find_program(CMAKE_CUDA_COMPILER ${named} HINTS ENV CUDA_HOME ENV CUDA_PATH PATHS /usr/local/cuda PATH_SUFFIXES bin DOC "nvcc")
endif()
set(problem "there is no nvcc")
if(CMAKE_CUDA_COMPILER)
  execute_process(COMMAND ${CMAKE_CUDA_COMPILER} --version OUTPUT_VARIABLE version ERROR_QUIET)
  string(REGEX MATCH "release ([0-9.]+)" version "${version}")
  set(version "${CMAKE_MATCH_1}")
  set(problem "")
  if(version VERSION_LESS 13.0)
    set(problem "${CMAKE_CUDA_COMPILER} is version ${version}")
  endif()
endif()
if(problem)
  if(TERN_CUDA STREQUAL "ON")
    message(FATAL_ERROR "TERN_CUDA is ON, but ${problem}: install the CUDA toolkit 13.0 or later, set CUDACXX to its nvcc, or build "
      "without the CUDA engine (TERN_CUDA=OFF)")
  endif()
  unset(CMAKE_CUDA_COMPILER CACHE)
  message(STATUS "CUDA engine: left out, ${problem} (13.0 or later is needed)")
  return()
endif()

# Machine code for each, and PTX of the last one.
set(CMAKE_CUDA_ARCHITECTURES ${TERN_CUDA_ARCHS})
list(POP_BACK CMAKE_CUDA_ARCHITECTURES last_arch)
list(TRANSFORM CMAKE_CUDA_ARCHITECTURES APPEND -real)
list(APPEND CMAKE_CUDA_ARCHITECTURES ${last_arch})
enable_language(CUDA)
if(NOT CMAKE_CUDA20_STANDARD_COMPILE_OPTION)  # CMake 3.25.1 does not know it yet
  set(CMAKE_CUDA20_STANDARD_COMPILE_OPTION -std=c++20)
endif()
set(CMAKE_CUDA_STANDARD 20)
set(CMAKE_CUDA_STANDARD_REQUIRED ON)
set(CMAKE_CUDA_EXTENSIONS OFF)
set(CMAKE_CUDA_VISIBILITY_PRESET hidden)
set(CMAKE_CUDA_RUNTIME_LIBRARY Static)
find_package(CUDAToolkit REQUIRED)
set(TERN_WITH_CUDA ON)
message(STATUS "CUDA engine: for ${TERN_CUDA_ARCHS}, by ${CMAKE_CUDA_COMPILER}")
