// SPDX-License-Identifier: Apache-2.0
// libtern is made of the folders' archives; this file is there because a library needs a source of its own.
