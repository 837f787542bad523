# SPDX-License-Identifier: Apache-2.0
# What `cmake --install` puts into the Python package instead of TernInstall's files: the library under the name that Python loads,
# the tern command and the headers.

# One file and no links, which a wheel would hold as copies.
set_target_properties(tern PROPERTIES VERSION ${PROJECT_VERSION_MAJOR})
install(TARGETS tern LIBRARY DESTINATION lib NAMELINK_SKIP)
install(DIRECTORY ${PROJECT_SOURCE_DIR}/include/tern DESTINATION include)
if(TARGET tern_command)
  set_target_properties(tern_command PROPERTIES INSTALL_RPATH "$ORIGIN/../lib")
  install(TARGETS tern_command DESTINATION bin)
endif()
