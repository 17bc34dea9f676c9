// SPDX-License-Identifier: Apache-2.0

// alone is what Go makes of a program that needs no libc: static.
package main

func main() {
	println("alone")
}
