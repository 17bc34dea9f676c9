/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Where the process begins, in place of the compiler's: that one asks for glibc 2.34,
 * and the program is to run with 2.28.  The older __libc_start_main takes functions that
 * run before main and after it; there are none.  Entry state and calling convention are
 * those of the System V ABI supplements for x86-64 and AArch64.
 */
#if defined(__x86_64__)
	.symver start_main, __libc_start_main@GLIBC_2.2.5
	.text
	.globl _start
	.type _start, @function
_start:
	.cfi_startproc
	.cfi_undefined rip
	endbr64
	xorl %ebp, %ebp
	movq %rdx, %r9
	popq %rsi
	movq %rsp, %rdx
	andq $-16, %rsp
	pushq %rax
	pushq %rsp
	xorl %r8d, %r8d
	xorl %ecx, %ecx
	leaq main(%rip), %rdi
	call *start_main@GOTPCREL(%rip)
	hlt
	.cfi_endproc
	.size _start, .-_start
#elif defined(__aarch64__)
	.symver start_main, __libc_start_main@GLIBC_2.17
	.text
	.globl _start
	.type _start, %function
_start:
	.cfi_startproc
	.cfi_undefined x30
	mov x29, #0
	mov x30, #0
	mov x5, x0
	ldr x1, [sp]
	add x2, sp, #8
	mov x6, sp
	adrp x0, main
	add x0, x0, #:lo12:main
	mov x3, #0
	mov x4, #0
	bl start_main
	brk #0
	.cfi_endproc
	.size _start, .-_start
#endif
	.section .note.GNU-stack, "", %progbits
