# SPDX-License-Identifier: Apache-2.0
# The target gpu_bundle: a folder with the GPU tests, the tern command, libtern.so and the libraries they need, to be copied to a
# machine that has only the driver and a glibc as new as this one's.
#
#   cmake --build build/cuda --target gpu_bundle      # fills build/gpu/bin and build/gpu/lib
#   build/gpu/run                                     # runs the tests there

set(TERN_GPU_BUNDLE_DIR ${PROJECT_SOURCE_DIR}/build/gpu CACHE PATH "Where the target gpu_bundle puts its files")

get_property(gpu_tests GLOBAL PROPERTY TERN_GPU_TESTS)
set(programs ${gpu_tests})
if(TARGET tern_command)
  list(APPEND programs tern_command)
endif()
set_target_properties(tern PROPERTIES BUILD_RPATH "$ORIGIN" INSTALL_RPATH "$ORIGIN")
set_target_properties(${programs} PROPERTIES INSTALL_RPATH "$ORIGIN/../lib")

install(TARGETS tern ${programs} RUNTIME_DEPENDENCY_SET gpu_bundle
  RUNTIME DESTINATION bin COMPONENT gpu_bundle EXCLUDE_FROM_ALL
  LIBRARY DESTINATION lib COMPONENT gpu_bundle EXCLUDE_FROM_ALL)
install(PROGRAMS ${PROJECT_SOURCE_DIR}/tests/gpu/run DESTINATION . COMPONENT gpu_bundle EXCLUDE_FROM_ALL)
# What every system with this glibc has is left out.
install(RUNTIME_DEPENDENCY_SET gpu_bundle
  POST_EXCLUDE_REGEXES "/(ld-linux.*|lib(c|m|dl|rt|pthread|resolv|util))\\.so"
  LIBRARY DESTINATION lib COMPONENT gpu_bundle EXCLUDE_FROM_ALL)

add_custom_target(gpu_bundle
  COMMAND ${CMAKE_COMMAND} -E rm -rf ${TERN_GPU_BUNDLE_DIR}
  COMMAND ${CMAKE_COMMAND} --install ${PROJECT_BINARY_DIR} --component gpu_bundle --prefix ${TERN_GPU_BUNDLE_DIR} --strip
  COMMENT "Collecting the GPU tests in ${TERN_GPU_BUNDLE_DIR}" VERBATIM)
add_dependencies(gpu_bundle tern ${programs})
