/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Which connections may be upgraded: the rules of KMAP_POLICY.
 *
 * docs/policy.md describes the format.  One rule a line, the first that matches decides;
 * each end of a connection asks its own rules, and either can keep it on the kernel.  The
 * text is read once, as the program starts: while it still has the user, the root
 * directory and the environment that it was given.  A policy that cannot be read or has
 * an error in it allows nothing.
 */
#ifndef KM_POLICY_H
#define KM_POLICY_H

#include <stddef.h>

#include "base/address.h"

/* Longest text of a policy, in bytes. */
#define KM_POLICY_TEXT 65536
/* Room for a description of an error, in bytes. */
#define KM_POLICY_ERROR 256

struct km_policy;

/* Allows nothing. */
extern const struct km_policy km_policy_nothing;

/* The names that program= is compared with; either may be empty. */
struct km_policy_program {
	const char *comm; /* of the process, up to 15 bytes */
	const char *exe;  /* last part of the path of its executable */
};

/*
 * Parses length bytes at text.  Rules for other programs than this one are checked and
 * left out; program NULL keeps none that name a program.  NULL on an error: then *line is
 * its line, counted from 1, or 0 when it is not one line's, and error says what it is.
 * The policy lives in pages of its own.  Allocates nothing by malloc.
 */
struct km_policy *km_policy_parse(const char *text, size_t length,
				  const struct km_policy_program *program,
				  unsigned *line, char error[KM_POLICY_ERROR]);
void km_policy_free(struct km_policy *policy);

/* What an end knows of its connection. */
struct km_policy_query {
	bool connector;
	struct km_address local, peer; /* as getsockname and getpeername say */
	/* Where the connector meant to go; for a connector the same as peer. */
	struct km_address to;
	/* A connection that the kernel redirected has its acceptor at another address.
	 * The connector learns of it from the acceptor. */
	bool via_known, redirected;
	struct km_address via;
	/* Of the other end; not known before the two have met. */
	bool uid_known;
	uint32_t uid;
};

enum km_policy_answer {
	KM_POLICY_DENY,
	KM_POLICY_ALLOW,
	KM_POLICY_OPEN, /* it depends on what is not known yet; not when all is known */
};

struct km_policy_decision {
	enum km_policy_answer answer;
	unsigned line;	/* of the rule that decided, 0 for none */
	bool names_uid; /* that rule is about the uid of the other end */
};

/* Makes no system call; any thread, and in signal handlers.  policy NULL allows. */
struct km_policy_decision km_policy_decide(const struct km_policy *policy,
					   const struct km_policy_query *query);

/*
 * Reads the rules that value, of KMAP_POLICY, stands for: a file's, or, behind
 * "rules:", its own.  An empty value is no policy.  An error is one line on standard
 * error and a policy that allows nothing.
 */
const struct km_policy *km_policy_load(const char *value);

#endif
