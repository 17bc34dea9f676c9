/* SPDX-License-Identifier: Apache-2.0 */
/*
 * vfork: the child runs in the parent's memory and on its stack until it execs or
 * exits, so the library must not record what it does to descriptors.  The child
 * is marked in the thread's state (km_thread.bypass, which it shares with its
 * suspended parent), and the parent takes the mark away when it goes on.
 *
 * The return address is kept in a register because the child returns over it.
 */
#define SYS_VFORK_X86_64 58
#define SYS_CLONE_AARCH64 220

#if defined(__x86_64__)
	.text
	.globl vfork
	.type vfork, @function
vfork:
	.cfi_startproc
	endbr64
	popq %rdi
	.cfi_adjust_cfa_offset -8
	.cfi_register %rip, %rdi
	movl $SYS_VFORK_X86_64, %eax
	syscall
	pushq %rdi
	.cfi_adjust_cfa_offset 8
	movq km_thread@gottpoff(%rip), %rcx
	testq %rax, %rax
	jz 1f
	js 2f
	movl $0, %fs:(%rcx)
	ret
1:	movl $1, %fs:(%rcx)
	ret
2:	negl %eax
	pushq %rax
	.cfi_adjust_cfa_offset 8
	call __errno_location@PLT
	popq %rcx
	.cfi_adjust_cfa_offset -8
	movl %ecx, (%rax)
	movq $-1, %rax
	ret
	.cfi_endproc
	.size vfork, .-vfork
	.globl __vfork
	.type __vfork, @function
	.set __vfork, vfork
#ifdef KM_MUSL
	/* Of glibc alone. */
	.hidden __vfork
#endif
#elif defined(__aarch64__)
	.text
	.globl vfork
	.type vfork, %function
vfork:
	/* clone(CLONE_VM | CLONE_VFORK | SIGCHLD, 0) */
	mov x0, #0x4111
	mov x1, #0
	mov x2, #0
	mov x3, #0
	mov x4, #0
	mov x8, #SYS_CLONE_AARCH64
	svc #0
	mrs x9, tpidr_el0
	adrp x10, :gottprel:km_thread
	ldr x10, [x10, #:gottprel_lo12:km_thread]
	cbz x0, 1f
	str wzr, [x9, x10]
	tbnz x0, #63, 2f
	ret
1:	mov w11, #1
	str w11, [x9, x10]
	ret
2:	neg w0, w0
	stp x30, x0, [sp, #-16]!
	bl __errno_location
	ldp x30, x1, [sp], #16
	str w1, [x0]
	mov x0, #-1
	ret
	.size vfork, .-vfork
	.globl __vfork
	.type __vfork, %function
	.set __vfork, vfork
#ifdef KM_MUSL
	/* Of glibc alone. */
	.hidden __vfork
#endif
#endif
	.section .note.GNU-stack, "", %progbits
