/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Copies between the program's memory and ours, see fault.h.
 *
 * Between km_user_begin and km_user_end nothing is pushed, the length stays in the
 * third argument's register and the start of the program's range in %r8 (x3 on arm64):
 * the handler reads the range there, and sends a fault in it to km_user_fault, which
 * returns for the whole function.
 */
#define EFAULT 14

#if defined(__x86_64__)
/* From here on wide registers are worth their end (vzeroupper).  The CPU's own copy,
 * rep movsb, is never better than them and on AMD ten times worse for some alignments. */
#define WIDE_FROM 256

	.text
	.globl km_user_begin, km_user_end, km_user_fault
	.hidden km_user_begin, km_user_end, km_user_fault
	.globl km_user_copy
	.hidden km_user_copy
	.type km_user_copy, @function
	.p2align 6
km_user_begin:
/* rdi: to, rsi: from, rdx: length, ecx: far, r8: start of the program's range */
km_user_copy:
	.cfi_startproc
	endbr64
	cmpq $16, %rdx
	jb 10f
	cmpq $32, %rdx
	ja 1f
	movups (%rsi), %xmm0
	movups -16(%rsi,%rdx), %xmm1
	movups %xmm0, (%rdi)
	movups %xmm1, -16(%rdi,%rdx)
	xorl %eax, %eax
	ret
1:	movups (%rsi), %xmm0
	movups 16(%rsi), %xmm1
	movups -32(%rsi,%rdx), %xmm2
	movups -16(%rsi,%rdx), %xmm3
	cmpq $64, %rdx
	ja 2f
	movups %xmm0, (%rdi)
	movups %xmm1, 16(%rdi)
	movups %xmm2, -32(%rdi,%rdx)
	movups %xmm3, -16(%rdi,%rdx)
	xorl %eax, %eax
	ret
2:	movups 32(%rsi), %xmm4
	movups 48(%rsi), %xmm5
	movups -64(%rsi,%rdx), %xmm6
	movups -48(%rsi,%rdx), %xmm7
	movups %xmm0, (%rdi)
	movups %xmm1, 16(%rdi)
	movups %xmm4, 32(%rdi)
	movups %xmm5, 48(%rdi)
	movups %xmm6, -64(%rdi,%rdx)
	movups %xmm7, -48(%rdi,%rdx)
	movups %xmm2, -32(%rdi,%rdx)
	movups %xmm3, -16(%rdi,%rdx)
	cmpq $128, %rdx
	ja 3f
	xorl %eax, %eax
	ret
	/* The first and last 64 bytes are done; what is between them starts where the
	 * destination is aligned. */
3:	leaq 64(%rdi), %rax
	andq $-64, %rax
	leaq -64(%rdi,%rdx), %r9
	subq %rdi, %rsi
	addq %rax, %rsi
	movq %rax, %rdi
	subq %rax, %r9
	testl %ecx, %ecx
	jnz 6f
	cmpq $WIDE_FROM, %rdx
	jb 4f
	cmpb $0, km_user_wide(%rip)
	je 4f
	.p2align 4
5:	vmovdqu (%rsi), %ymm0
	vmovdqu 32(%rsi), %ymm1
	vmovdqa %ymm0, (%rdi)
	vmovdqa %ymm1, 32(%rdi)
	addq $64, %rsi
	addq $64, %rdi
	subq $64, %r9
	ja 5b
	vzeroupper
	xorl %eax, %eax
	ret
	.p2align 4
4:	movups (%rsi), %xmm0
	movups 16(%rsi), %xmm1
	movups 32(%rsi), %xmm2
	movups 48(%rsi), %xmm3
	movaps %xmm0, (%rdi)
	movaps %xmm1, 16(%rdi)
	movaps %xmm2, 32(%rdi)
	movaps %xmm3, 48(%rdi)
	addq $64, %rsi
	addq $64, %rdi
	subq $64, %r9
	ja 4b
	xorl %eax, %eax
	ret
	/* Stores of whole lines that do not fetch them.  They are weakly ordered, so that
	 * the fence belongs to the copy. */
	.p2align 4
6:	movups (%rsi), %xmm0
	movups 16(%rsi), %xmm1
	movups 32(%rsi), %xmm2
	movups 48(%rsi), %xmm3
	movntdq %xmm0, (%rdi)
	movntdq %xmm1, 16(%rdi)
	movntdq %xmm2, 32(%rdi)
	movntdq %xmm3, 48(%rdi)
	addq $64, %rsi
	addq $64, %rdi
	subq $64, %r9
	ja 6b
	sfence
	xorl %eax, %eax
	ret
10:	cmpq $8, %rdx
	jb 11f
	movq (%rsi), %rax
	movq -8(%rsi,%rdx), %rcx
	movq %rax, (%rdi)
	movq %rcx, -8(%rdi,%rdx)
	xorl %eax, %eax
	ret
11:	cmpq $4, %rdx
	jb 12f
	movl (%rsi), %eax
	movl -4(%rsi,%rdx), %ecx
	movl %eax, (%rdi)
	movl %ecx, -4(%rdi,%rdx)
	xorl %eax, %eax
	ret
12:	testq %rdx, %rdx
	jz 13f
	movzbl (%rsi), %eax
	movzbl -1(%rsi,%rdx), %ecx
	cmpq $3, %rdx
	jne 14f
	movzbl 1(%rsi), %r9d
	movb %r9b, 1(%rdi)
14:	movb %al, (%rdi)
	movb %cl, -1(%rdi,%rdx)
13:	xorl %eax, %eax
	ret
	.cfi_endproc
	.size km_user_copy, .-km_user_copy

	.globl km_user_probe
	.hidden km_user_probe
	.type km_user_probe, @function
	.p2align 4
/* rdi: start, rsi: length */
km_user_probe:
	.cfi_startproc
	endbr64
	movq %rdi, %r8
	movq %rsi, %rdx
	xorl %eax, %eax
	testq %rsi, %rsi
	jz 22f
	addq %rdi, %rsi
	jc 23f
21:	movzbl (%rdi), %ecx
	orq $4095, %rdi
	addq $1, %rdi
	cmpq %rsi, %rdi
	jb 21b
22:	ret
23:	movl $-EFAULT, %eax
	ret
	.cfi_endproc
	.size km_user_probe, .-km_user_probe
km_user_end:

km_user_fault:
	.cfi_startproc
	cmpb $0, km_user_wide(%rip)
	je 1f
	vzeroupper
1:	movl $-EFAULT, %eax
	ret
	.cfi_endproc

/*
 * What a signal handler returns to.  Debuggers and unwinders know it by exactly these
 * instructions, and by the lack of a description; libc's own is no different.
 */
	.globl km_fault_return
	.hidden km_fault_return
	.type km_fault_return, @function
	.p2align 4
	nop
km_fault_return:
	movq $15, %rax
	syscall
	.size km_fault_return, .-km_fault_return

#elif defined(__aarch64__)
	.text
	.globl km_user_begin, km_user_end, km_user_fault
	.hidden km_user_begin, km_user_end, km_user_fault
	.globl km_user_copy
	.hidden km_user_copy
	.type km_user_copy, %function
	.p2align 6
km_user_begin:
/* x0: to, x1: from, x2: length, w3: far (no use is made of it), x4: start of the
 * program's range */
km_user_copy:
	.cfi_startproc
	hint #34 /* bti c */
	mov x3, x4
	add x4, x1, x2
	add x5, x0, x2
	cmp x2, #16
	b.lo 10f
	cmp x2, #32
	b.hi 1f
	ldr q0, [x1]
	ldur q1, [x4, #-16]
	str q0, [x0]
	stur q1, [x5, #-16]
	mov w0, #0
	ret
1:	ldp q0, q1, [x1]
	ldp q2, q3, [x4, #-32]
	cmp x2, #64
	b.hi 2f
	stp q0, q1, [x0]
	stp q2, q3, [x5, #-32]
	mov w0, #0
	ret
2:	ldp q4, q5, [x1, #32]
	ldp q6, q7, [x4, #-64]
	stp q0, q1, [x0]
	stp q4, q5, [x0, #32]
	stp q6, q7, [x5, #-64]
	stp q2, q3, [x5, #-32]
	cmp x2, #128
	b.hi 3f
	mov w0, #0
	ret
	/* The first and last 64 bytes are done; what is between them starts where the
	 * destination is aligned. */
3:	add x6, x0, #64
	and x6, x6, #-64
	sub x7, x6, x0
	add x1, x1, x7
	sub x5, x5, #64
4:	ldp q0, q1, [x1]
	ldp q2, q3, [x1, #32]
	stp q0, q1, [x6]
	stp q2, q3, [x6, #32]
	add x1, x1, #64
	add x6, x6, #64
	cmp x6, x5
	b.lo 4b
	mov w0, #0
	ret
10:	tbz x2, #3, 11f
	ldr x6, [x1]
	ldur x7, [x4, #-8]
	str x6, [x0]
	stur x7, [x5, #-8]
	mov w0, #0
	ret
11:	tbz x2, #2, 12f
	ldr w6, [x1]
	ldur w7, [x4, #-4]
	str w6, [x0]
	stur w7, [x5, #-4]
	mov w0, #0
	ret
12:	cbz x2, 13f
	lsr x8, x2, #1
	ldrb w6, [x1]
	ldrb w7, [x1, x8]
	ldurb w9, [x4, #-1]
	strb w6, [x0]
	strb w7, [x0, x8]
	sturb w9, [x5, #-1]
13:	mov w0, #0
	ret
	.cfi_endproc
	.size km_user_copy, .-km_user_copy

	.globl km_user_probe
	.hidden km_user_probe
	.type km_user_probe, %function
	.p2align 4
/* x0: start, x1: length */
km_user_probe:
	.cfi_startproc
	hint #34 /* bti c */
	mov x3, x0
	mov x2, x1
	mov x4, x0
	mov w0, #0
	cbz x1, 22f
	adds x1, x1, x4
	b.cs 23f
21:	ldrb w5, [x4]
	orr x4, x4, #4095
	add x4, x4, #1
	cmp x4, x1
	b.lo 21b
22:	ret
23:	mov w0, #-EFAULT
	ret
	.cfi_endproc
	.size km_user_probe, .-km_user_probe
km_user_end:

km_user_fault:
	.cfi_startproc
	mov w0, #-EFAULT
	ret
	.cfi_endproc
#endif
	.section .note.GNU-stack, "", %progbits
