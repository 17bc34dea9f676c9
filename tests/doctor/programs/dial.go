// SPDX-License-Identifier: Apache-2.0

// dial connects and sends. With the package net it is linked to libc (cgo), and still
// makes its system calls itself.
package main

import (
	"net"
	"os"
)

func main() {
	conn, err := net.Dial("tcp", os.Args[1])
	if err != nil {
		panic(err)
	}
	conn.Write([]byte("hello"))
}
