// SPDX-License-Identifier: Apache-2.0

// listen prints where it listens and waits. With the package net it is linked to libc
// (cgo), and still makes its system calls itself.
package main

import (
	"fmt"
	"net"
	"os"
)

func main() {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		panic(err)
	}
	fmt.Println(listener.Addr())
	os.Stdin.Read(make([]byte, 1))
}
