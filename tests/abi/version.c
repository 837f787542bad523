/* SPDX-License-Identifier: Apache-2.0
 *
 * A C program that links with the shared library: header and library are of the same version, and the texts that need no
 * group are there.
 */
#include <stdio.h>
#include <string.h>
#include <tern/tern.h>

static int failures = 0;

static void expect(int holds, const char* what) {
  if (holds) return;
  fprintf(stderr, "not so: %s\n", what);
  ++failures;
}

int main(void) {
  expect(tern_version() == TERN_VERSION_MAJOR * 10000 + TERN_VERSION_MINOR * 100 + TERN_VERSION_PATCH,
         "header and library have one version");
  expect(strcmp(tern_status_name(TERN_OK), "TERN_OK") == 0, "status 0 is TERN_OK");
  expect(strcmp(tern_status_name(TERN_INTERNAL_ERROR), "TERN_INTERNAL_ERROR") == 0, "the last status has its name");
  expect(strcmp(tern_status_name((tern_status)99), "TERN_UNKNOWN") == 0, "an unknown status is called so");
  expect(strcmp(tern_last_error(), "") == 0, "no error before the first one");

  tern_group* groups[2] = {NULL, NULL};
  expect(tern_group_create_local(NULL, -1, groups) == TERN_INVALID_ARGUMENT, "a group of -1 ranks is refused");
  expect(groups[0] == NULL && groups[1] == NULL, "a refused call writes nothing");
  expect(strstr(tern_last_error(), "-1") != NULL, "the text says what was asked");
  return failures == 0 ? 0 : 1;
}
