# SPDX-License-Identifier: Apache-2.0
# Builds for musl on a glibc host, with Debian's musl-tools; preset musl uses it.
#
# The compiler leaves out all of /usr/include, and with it the kernel's headers, which
# belong to no libc.  They are put into a directory of their own.
set(CMAKE_SYSTEM_NAME Linux)
set(CMAKE_C_COMPILER musl-gcc)
set(CMAKE_ASM_COMPILER musl-gcc)

set(kmap_headers ${CMAKE_BINARY_DIR}/kernel-headers)
file(MAKE_DIRECTORY ${kmap_headers})
foreach(part linux asm asm-generic)
  file(GLOB found /usr/include/${part} /usr/include/*-linux-gnu/${part})
  # More than one: those of this machine are the ones that are not for a cross compiler.
  foreach(directory IN LISTS found)
    file(CREATE_LINK ${directory} ${kmap_headers}/${part} SYMBOLIC)
    break()
  endforeach()
endforeach()
set(CMAKE_C_STANDARD_INCLUDE_DIRECTORIES ${kmap_headers})
set(CMAKE_ASM_STANDARD_INCLUDE_DIRECTORIES ${kmap_headers})
