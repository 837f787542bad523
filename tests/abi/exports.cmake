# SPDX-License-Identifier: Apache-2.0
# Compares what a built libtern.so exports with what tern.h declares, in both directions:
#   cmake -D NM=... -D READELF=... -D LIBRARY=libtern.so -D HEADER=tern.h -D SONAME=libtern.so.0 -P exports.cmake
cmake_minimum_required(VERSION 3.25)

file(READ ${HEADER} header)
string(REGEX MATCHALL "\nTERN_API [^(;]*[ *]tern_[a-z0-9_]+\\(" declarations "${header}")
foreach(declaration IN LISTS declarations)
  string(REGEX REPLACE ".*[ *](tern_[a-z0-9_]+)\\($" "\\1" name "${declaration}")
  list(APPEND declared ${name}@@TERN_0)
endforeach()
list(LENGTH declared num_declared)
if(num_declared LESS 20)
  message(FATAL_ERROR "found only ${num_declared} functions in ${HEADER}: does it still mark them with TERN_API?")
endif()

execute_process(COMMAND ${NM} --dynamic --defined-only --with-symbol-versions --format=posix ${LIBRARY}
  OUTPUT_VARIABLE symbols COMMAND_ERROR_IS_FATAL ANY)
string(REGEX MATCHALL "[^\n]+" symbols "${symbols}")
foreach(symbol IN LISTS symbols)
  string(REGEX REPLACE " .*" "" name "${symbol}")
  if(NOT name MATCHES "^TERN_0(@@TERN_0)?$") # the version node itself
    list(APPEND exported ${name})
  endif()
endforeach()

set(missing ${declared})
list(REMOVE_ITEM missing ${exported})
set(surplus ${exported})
list(REMOVE_ITEM surplus ${declared})
execute_process(COMMAND ${READELF} --dynamic ${LIBRARY} OUTPUT_VARIABLE dynamic COMMAND_ERROR_IS_FATAL ANY)
string(REGEX REPLACE ".*Library soname: \\[([^]]*)\\].*" "\\1" soname "${dynamic}")

if(missing)
  message(SEND_ERROR "declared in tern.h but not exported: ${missing}")
endif()
if(surplus)
  message(SEND_ERROR "exported but not declared in tern.h: ${surplus}")
endif()
if(NOT soname STREQUAL SONAME)
  message(SEND_ERROR "the library calls itself ${soname}, not ${SONAME}")
endif()
if(NOT missing AND NOT surplus)
  message(STATUS "${num_declared} functions declared and exported, nothing else; ${soname}")
endif()
