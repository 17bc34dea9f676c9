/* SPDX-License-Identifier: Apache-2.0 */
#include "base/policy.h"

#include <arpa/inet.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>

#include "base/proc.h"

/* Fields that a rule names. */
#define HAS_ROLE 1u
#define HAS_LOCAL 2u
#define HAS_PEER 4u
#define HAS_TO 8u
#define HAS_VIA 16u
#define HAS_PORT 32u
#define HAS_UID 64u
#define HAS_PROGRAM 128u

/* Longest name of a program: that of a file. */
#define PROGRAM_MAX 255
#define QUOTED 60

struct ports {
	uint16_t low, high; /* 0, 0: any */
};

/* Addresses whose first bits are those of ip. */
struct net {
	uint8_t ip[16];
	uint8_t bits;
	struct ports ports;
};

struct rule {
	bool allow, connector;
	uint8_t has;
	unsigned line;
	uint32_t uid;
	struct ports port;
	struct net local, peer, to, via;
};

struct km_policy {
	size_t bytes;
	size_t count;
	bool allow; /* what no rule matches */
	unsigned default_line;
	struct rule rules[];
};

const struct km_policy km_policy_nothing = {.allow = false};

/* A piece of the text. */
struct word {
	const char *at;
	size_t length;
};

struct parser {
	struct word rest;
	unsigned line;
	char *error;
	const struct km_policy_program *program;
};

/* -- errors ----------------------------------------------------------------- */

/* Says what is wrong with word; false, for the caller to return. */
static bool wrong(struct parser *p, struct word word, const char *format, ...)
	__attribute__((format(printf, 3, 4)));
static bool wrong(struct parser *p, struct word word, const char *format, ...)
{
	size_t shown = KM_MIN(word.length, (size_t)QUOTED);
	size_t used = 0;
	va_list args;

	/* Nothing that a terminal would obey. */
	for (size_t i = 0; i < shown; i++) {
		unsigned char c = (unsigned char)word.at[i];

		p->error[used++] = c < ' ' || c == 127 ? '?' : (char)c;
	}
	if (word.length > shown)
		used += (size_t)snprintf(p->error + used, 4, "...");
	if (used)
		used += (size_t)snprintf(p->error + used, 3, ": ");
	va_start(args, format);
	vsnprintf(p->error + used, KM_POLICY_ERROR - used, format, args);
	va_end(args);
	return false;
}

/* -- words ------------------------------------------------------------------ */

static bool is_blank(char c)
{
	return c == ' ' || c == '\t' || c == '\r';
}

/* Takes what is before the separator, which is taken too, or all there is. */
static struct word take_until(struct word *from, char separator)
{
	const char *end =
		from->length ? memchr(from->at, separator, from->length) : NULL;
	struct word taken = {from->at, end ? (size_t)(end - from->at) : from->length};
	size_t gone = taken.length + (end ? 1 : 0);

	from->at += gone;
	from->length -= gone;
	return taken;
}

/* The next word of a line; its length is 0 at the end, and where a comment begins. */
static struct word take_word(struct word *line)
{
	struct word word;

	while (line->length && is_blank(*line->at)) {
		line->at++;
		line->length--;
	}
	word = (struct word){line->at, 0};
	if (line->length && *line->at == '#')
		line->length = 0;
	while (word.length < line->length && !is_blank(word.at[word.length]))
		word.length++;
	line->at += word.length;
	line->length -= word.length;
	return word;
}

static bool is(struct word word, const char *text)
{
	return word.length == strlen(text) && memcmp(word.at, text, word.length) == 0;
}

/* Digits alone, without a zero in front, up to most. */
static bool number(struct word word, uint64_t most, uint64_t *out)
{
	uint64_t value = 0;

	if (word.length == 0 || word.length > 10 ||
	    (word.length > 1 && word.at[0] == '0'))
		return false;
	for (size_t i = 0; i < word.length; i++) {
		if (word.at[i] < '0' || word.at[i] > '9')
			return false;
		value = value * 10 + (uint64_t)(word.at[i] - '0');
	}
	*out = value;
	return value <= most;
}

/* -- values ----------------------------------------------------------------- */

static bool parse_ports(struct word word, struct ports *out)
{
	struct word rest = word, first = take_until(&rest, '-');
	bool range = first.length < word.length;
	uint64_t low, high;

	if (!number(first, UINT16_MAX, &low) || low == 0)
		return false;
	high = low;
	if (range && !number(rest, UINT16_MAX, &high))
		return false;
	*out = (struct ports){(uint16_t)low, (uint16_t)high};
	return low <= high;
}

/* ADDRESS or ADDRESS/BITS of that family. */
static bool parse_prefix(struct word word, int family, struct net *out)
{
	static const uint8_t mapped[12] = {0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff};
	struct word rest = word, address = take_until(&rest, '/');
	uint64_t most = family == AF_INET ? 32 : 128, bits = most;
	uint8_t *at = out->ip;
	char text[INET6_ADDRSTRLEN];

	if (address.length == 0 || address.length >= sizeof(text) ||
	    memchr(address.at, '\0', address.length))
		return false;
	memcpy(text, address.at, address.length);
	text[address.length] = '\0';
	if (family == AF_INET) {
		memcpy(at, mapped, sizeof(mapped));
		at += sizeof(mapped);
	}
	if (inet_pton(family, text, at) != 1)
		return false;
	if (address.length < word.length && !number(rest, most, &bits))
		return false;
	out->bits = (uint8_t)(bits + (family == AF_INET ? 96 : 0));
	return true;
}

/* *, an IPv4 address or prefix, or one of IPv6 in brackets, each with ports or not. */
static bool parse_net(struct word word, struct net *out)
{
	struct word rest = word, address;
	bool ports;

	memset(out, 0, sizeof(*out));
	if (word.length && word.at[0] == '[') {
		take_until(&rest, '[');
		address = take_until(&rest, ']');
		if (address.at + address.length == word.at + word.length ||
		    !parse_prefix(address, AF_INET6, out))
			return false;
		ports = rest.length > 0;
		if (ports && take_until(&rest, ':').length)
			return false;
	} else {
		address = take_until(&rest, ':');
		ports = address.length < word.length;
		if (!is(address, "*") && !parse_prefix(address, AF_INET, out))
			return false;
	}
	return !ports || parse_ports(rest, &out->ports);
}

static const char net_help[] =
	"not an address: 10.0.0.1, 10.0.0.0/8, [fd00::1], [fd00::]/8 written as "
	"[fd00::/8], or *; a port or a range of ports may follow: 10.0.0.1:8080-8089";

static bool parse_program(struct parser *p, struct word word, struct word value,
			  bool *here)
{
	const struct km_policy_program *program = p->program;

	if (value.length == 0 || value.length > PROGRAM_MAX ||
	    memchr(value.at, '/', value.length))
		return wrong(p, word,
			     "a program is the name of a process or the last part of "
			     "its path, up to %d bytes",
			     PROGRAM_MAX);
	*here = program && (is(value, program->comm) || is(value, program->exe));
	return true;
}

/* One NAME=VALUE. */
static bool parse_field(struct parser *p, struct word word, struct rule *rule,
			bool *here)
{
	static const struct {
		const char *name;
		uint8_t flag;
	} fields[] = {{"role", HAS_ROLE}, {"local", HAS_LOCAL},	   {"peer", HAS_PEER},
		      {"to", HAS_TO},	  {"via", HAS_VIA},	   {"port", HAS_PORT},
		      {"uid", HAS_UID},	  {"program", HAS_PROGRAM}};
	struct word value = word, name = take_until(&value, '=');
	uint8_t flag = 0;
	uint64_t uid;

	for (size_t i = 0; i < KM_COUNT(fields); i++)
		if (is(name, fields[i].name))
			flag = fields[i].flag;
	if (flag == 0 || name.length == word.length)
		return wrong(p, word,
			     "no field of a rule; they are role=, local=, peer=, to=, "
			     "via=, port=, uid= and program=");
	if (rule->has & flag)
		return wrong(p, word, "the rule has this field already");
	rule->has |= flag;
	switch (flag) {
	case HAS_ROLE:
		rule->connector = is(value, "connector");
		return rule->connector || is(value, "acceptor") ||
		       wrong(p, word, "a role is connector or acceptor");
	case HAS_LOCAL:
		return parse_net(value, &rule->local) || wrong(p, word, net_help);
	case HAS_PEER:
		return parse_net(value, &rule->peer) || wrong(p, word, net_help);
	case HAS_TO:
		return parse_net(value, &rule->to) || wrong(p, word, net_help);
	case HAS_VIA:
		return parse_net(value, &rule->via) || wrong(p, word, net_help);
	case HAS_PORT:
		return parse_ports(value, &rule->port) ||
		       wrong(p, word,
			     "a port is a number from 1 to 65535, or a range: "
			     "8080-8089");
	case HAS_UID:
		if (!number(value, UINT32_MAX - 1, &uid))
			return wrong(p, word,
				     "a user id is a number; id -u NAME prints it");
		rule->uid = (uint32_t)uid;
		return true;
	default:
		return parse_program(p, word, value, here);
	}
}

/* One line, into the policy's next rule. */
static bool parse_line(struct parser *p, struct word line, struct km_policy *policy)
{
	struct rule *rule = &policy->rules[policy->count];
	struct word first = take_word(&line), word;
	bool here = true, allow;

	if (first.length == 0)
		return true;
	if (policy->default_line)
		return wrong(p, first,
			     "nothing may follow the default of line %u, as nothing "
			     "would come to it",
			     policy->default_line);
	if (is(first, "default")) {
		word = take_word(&line);
		allow = is(word, "allow");
		if ((!allow && !is(word, "deny")) || take_word(&line).length)
			return wrong(p, first,
				     "a default is allow or deny, and no more");
		policy->allow = allow;
		policy->default_line = p->line;
		return true;
	}
	memset(rule, 0, sizeof(*rule));
	rule->line = p->line;
	rule->allow = is(first, "allow");
	if (!rule->allow && !is(first, "deny"))
		return wrong(p, first, "a line begins with allow, deny or default");
	while ((word = take_word(&line)).length)
		if (!parse_field(p, word, rule, &here))
			return false;
	if (rule->has == 0)
		return wrong(p, first,
			     "a rule names a field at least; for all connections "
			     "there is default %s",
			     rule->allow ? "allow" : "deny");
	if (here)
		policy->count++;
	return true;
}

struct km_policy *km_policy_parse(const char *text, size_t length,
				  const struct km_policy_program *program,
				  unsigned *line, char error[KM_POLICY_ERROR])
{
	struct parser p = {.rest = {text, length}, .error = error, .program = program};
	struct km_policy *policy;
	size_t lines = 2, bytes;

	*line = 0;
	if (length > KM_POLICY_TEXT) {
		snprintf(error, KM_POLICY_ERROR, "longer than %d bytes",
			 KM_POLICY_TEXT);
		return NULL;
	}
	for (size_t i = 0; i < length; i++)
		lines += text[i] == '\n';
	bytes = sizeof(*policy) + lines * sizeof(policy->rules[0]);
	policy = km_pages(bytes, false);
	if (!policy) {
		snprintf(error, KM_POLICY_ERROR, "no memory for its rules");
		return NULL;
	}
	policy->bytes = bytes;
	while (p.rest.length) {
		p.line++;
		if (!parse_line(&p, take_until(&p.rest, '\n'), policy)) {
			*line = p.line;
			km_policy_free(policy);
			return NULL;
		}
	}
	return policy;
}

void km_policy_free(struct km_policy *policy)
{
	munmap(policy, policy->bytes);
}

/* -- decisions -------------------------------------------------------------- */

enum match { NO, MAYBE, YES };

static bool in_ports(const struct ports *ports, uint16_t port)
{
	return ports->low == 0 || (ports->low <= port && port <= ports->high);
}

static bool in_net(const struct net *net, const struct km_address *address)
{
	unsigned bytes = net->bits / 8, bits = net->bits % 8;

	return in_ports(&net->ports, address->port) &&
	       memcmp(net->ip, address->ip, bytes) == 0 &&
	       (bits == 0 || (net->ip[bytes] ^ address->ip[bytes]) >> (8 - bits) == 0);
}

static enum match match(const struct rule *rule, const struct km_policy_query *q)
{
	unsigned has = rule->has;
	enum match result = YES;

	if (((has & HAS_ROLE) && rule->connector != q->connector) ||
	    ((has & HAS_LOCAL) && !in_net(&rule->local, &q->local)) ||
	    ((has & HAS_PEER) && !in_net(&rule->peer, &q->peer)) ||
	    ((has & HAS_TO) && !in_net(&rule->to, &q->to)) ||
	    ((has & HAS_PORT) && !in_ports(&rule->port, q->to.port)))
		return NO;
	if (has & HAS_VIA) {
		if (!q->via_known)
			result = MAYBE;
		else if (!q->redirected || !in_net(&rule->via, &q->via))
			return NO;
	}
	if (has & HAS_UID) {
		if (!q->uid_known)
			result = MAYBE;
		else if (rule->uid != q->uid)
			return NO;
	}
	return result;
}

struct km_policy_decision km_policy_decide(const struct km_policy *policy,
					   const struct km_policy_query *query)
{
	struct km_policy_decision decision = {.answer = KM_POLICY_ALLOW};
	/* Whether what is not known yet can make it one or the other. */
	bool can[2] = {false, false};
	enum match matched = NO;

	if (!policy)
		return decision;
	for (size_t i = 0; i < policy->count && matched != YES; i++) {
		const struct rule *rule = &policy->rules[i];

		matched = match(rule, query);
		if (matched == NO)
			continue;
		can[rule->allow] = true;
		decision.line = rule->line;
		decision.names_uid = rule->has & HAS_UID;
	}
	if (matched != YES) {
		can[policy->allow] = true;
		decision.line = policy->default_line;
		decision.names_uid = false;
	}
	decision.answer = can[0] && can[1] ? KM_POLICY_OPEN
			  : can[1]	   ? KM_POLICY_ALLOW
					   : KM_POLICY_DENY;
	return decision;
}
