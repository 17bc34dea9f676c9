/* SPDX-License-Identifier: Apache-2.0 */
/* Rules: what is refused and where, what each field means, and what a process does with a
 * policy that it cannot read. */
#include <arpa/inet.h>
#include <fcntl.h>

#include "base/policy.h"
#include "base/proc.h"
#include "unit.h"

static const struct km_policy_program envoy = {"envoy", "envoy-1.40"};

static struct km_policy *parse(const char *text)
{
	char error[KM_POLICY_ERROR];
	unsigned line;
	struct km_policy *policy =
		km_policy_parse(text, strlen(text), &envoy, &line, error);

	if (!policy)
		fprintf(stderr, "%s\nline %u: %s\n", text, line, error);
	CHECK(policy);
	return policy;
}

static struct km_address at(const char *ip, uint16_t port)
{
	struct km_address found = {.port = port};

	if (strchr(ip, ':')) {
		CHECK_IS(inet_pton(AF_INET6, ip, found.ip), 1);
	} else {
		memset(found.ip + 10, 0xff, 2);
		CHECK_IS(inet_pton(AF_INET, ip, found.ip + 12), 1);
	}
	return found;
}

static enum km_policy_answer decide(const char *text, struct km_policy_query query)
{
	struct km_policy *policy = parse(text);
	enum km_policy_answer answer = km_policy_decide(policy, &query).answer;

	km_policy_free(policy);
	return answer;
}

/* A connection of 10.0.0.5:40000 to ip:port, all known, the other end of user 1000. */
static struct km_policy_query query(bool connector, const char *ip, uint16_t port)
{
	struct km_policy_query q = {.connector = connector,
				    .via_known = true,
				    .uid_known = true,
				    .uid = 1000};
	struct km_address client = at("10.0.0.5", 40000), server = at(ip, port);

	q.local = connector ? client : server;
	q.peer = connector ? server : client;
	q.to = q.via = server;
	return q;
}

static struct km_policy_query to(const char *ip, uint16_t port)
{
	return query(true, ip, port);
}

/* -- errors ----------------------------------------------------------------- */

static void refused(const char *text, size_t length, unsigned at_line, const char *why)
{
	char error[KM_POLICY_ERROR];
	unsigned line = 77;

	memset(error, 'x', sizeof(error));
	CHECK(!km_policy_parse(text, length, &envoy, &line, error));
	CHECK(memchr(error, '\0', sizeof(error)));
	if (line != at_line || !strstr(error, why)) {
		fprintf(stderr, "%s\ngave line %u: %s\n", text, line, error);
		exit(1);
	}
	for (const char *c = error; *c; c++)
		CHECK((unsigned char)*c >= ' ');
}

static void errors_name_line_and_word(void)
{
	static const struct {
		const char *text;
		unsigned line;
		const char *why;
	} bad[] = {
		{"allow port=80\nalow port=81\n", 2, "alow: a line begins with"},
		{"\n# x\nallow prot=80", 3, "prot=80: no field of a rule"},
		{"allow port", 1, "port: no field of a rule"},
		{"allow =80", 1, "=80: no field"},
		{"allow", 1, "a rule names a field at least"},
		{"deny # port=80", 1, "default deny"},
		{"allow port=80 port=81", 1,
		 "port=81: the rule has this field already"},
		{"allow port=0", 1, "port=0: a port is"},
		{"allow port=65536", 1, "a port is"},
		{"allow port=080", 1, "a port is"},
		{"allow port=90-80", 1, "a port is"},
		{"allow port=80-", 1, "a port is"},
		{"allow port=-80", 1, "a port is"},
		{"allow port=80-90-100", 1, "a port is"},
		{"allow port=", 1, "a port is"},
		{"allow port=99999999999999999999", 1, "a port is"},
		{"allow role=server", 1, "a role is connector or acceptor"},
		{"allow uid=root", 1, "id -u NAME"},
		{"allow uid=4294967295", 1, "a user id is a number"},
		{"allow uid=-1", 1, "a user id is a number"},
		{"allow uid=12345678901", 1, "a user id is a number"},
		{"allow program=", 1, "a program is"},
		{"allow program=/usr/bin/envoy", 1, "last part of its path"},
		{"allow peer=localhost:80", 1, "not an address"},
		{"allow peer=127.0.0.1:", 1, "not an address"},
		{"allow peer=127.0.0.1:http", 1, "not an address"},
		{"allow peer=127.0.0.1:80:81", 1, "not an address"},
		{"allow peer=127.0.0.256", 1, "not an address"},
		{"allow peer=127.0.0", 1, "not an address"},
		{"allow peer=127.0.0.1/33", 1, "not an address"},
		{"allow peer=127.0.0.1/", 1, "not an address"},
		{"allow local=::1", 1, "not an address"},
		{"allow local=[::1", 1, "not an address"},
		{"allow local=[]", 1, "not an address"},
		{"allow local=[::1]80", 1, "not an address"},
		{"allow local=[::1]:", 1, "not an address"},
		{"allow local=[::1/129]", 1, "not an address"},
		{"allow local=[::1%lo]:80", 1, "not an address"},
		{"allow local=[127.0.0.1]", 1, "not an address"},
		{"allow to=", 1, "not an address"},
		{"allow to=:80", 1, "not an address"},
		{"allow via=**", 1, "not an address"},
		{"default", 1, "a default is allow or deny"},
		{"default allow deny", 1, "a default is allow or deny"},
		{"default maybe", 1, "a default is allow or deny"},
		{"default deny\n\nallow port=80", 3, "default of line 1"},
		{"default deny\ndefault deny", 2, "default of line 1"},
		{"\033[2Jallow", 1, "?[2Jallow: a line begins"},
	};
	static char text[KM_POLICY_TEXT + 1];

	for (size_t i = 0; i < KM_COUNT(bad); i++)
		refused(bad[i].text, strlen(bad[i].text), bad[i].line, bad[i].why);
	refused("allow\0port=80", 13, 1, "allow?port=80: a line begins");
	refused("allow peer=1.2.3.4\0:80", 22, 1, "not an address");
	memset(text, 'a', sizeof(text));
	refused(text, sizeof(text) - 1, 1, "...: a line begins");
	refused(text, sizeof(text), 0, "longer than 65536 bytes");
}

/* Text that fills what is allowed, and as many rules as fit. */
static void as_many_rules_as_fit(void)
{
	static char text[KM_POLICY_TEXT + 16];
	size_t used = 0;
	unsigned rules = 0;
	char error[KM_POLICY_ERROR];
	struct km_policy *policy;
	struct km_policy_query q = to("127.0.0.1", 9);

	while (used + 11 <= KM_POLICY_TEXT - 12) {
		memcpy(text + used, "deny uid=7\n", 11);
		used += 11;
		rules++;
	}
	memcpy(text + used, "allow port=9", 12);
	policy = km_policy_parse(text, used + 12, NULL, &(unsigned){0}, error);
	CHECK(policy);
	CHECK_IS(km_policy_decide(policy, &q).answer, KM_POLICY_ALLOW);
	CHECK_IS(km_policy_decide(policy, &q).line, rules + 1);
	km_policy_free(policy);
}

/* -- meaning ---------------------------------------------------------------- */

static void the_first_that_matches_decides(void)
{
	static const char text[] = "deny port=81\r\n"
				   "  allow\tport=80-89  # a comment\n"
				   "deny port=85\n"
				   "default allow # of all others";
	struct km_policy *policy = parse(text);
	struct km_policy_query q = to("127.0.0.1", 81);

	CHECK_IS(km_policy_decide(policy, &q).line, 1);
	q = to("127.0.0.1", 85);
	CHECK_IS(km_policy_decide(policy, &q).line, 2);
	q = to("127.0.0.1", 90);
	CHECK_IS(km_policy_decide(policy, &q).line, 4);
	km_policy_free(policy);
	CHECK_IS(decide(text, to("127.0.0.1", 81)), KM_POLICY_DENY);
	CHECK_IS(decide(text, to("127.0.0.1", 80)), KM_POLICY_ALLOW);
	CHECK_IS(decide(text, to("127.0.0.1", 85)), KM_POLICY_ALLOW);
	CHECK_IS(decide(text, to("127.0.0.1", 90)), KM_POLICY_ALLOW);
}

/* What no rule allows stays on the kernel. */
static void silence_denies(void)
{
	CHECK_IS(decide("", to("127.0.0.1", 80)), KM_POLICY_DENY);
	CHECK_IS(decide("deny port=1", to("127.0.0.1", 80)), KM_POLICY_DENY);
	CHECK_IS(decide("allow port=1", to("127.0.0.1", 80)), KM_POLICY_DENY);
	CHECK_IS(decide("default allow", to("127.0.0.1", 80)), KM_POLICY_ALLOW);
}

static void addresses(void)
{
	static const struct {
		const char *net, *ip;
		bool in;
	} table[] = {
		{"127.0.0.1", "127.0.0.1", true},
		{"127.0.0.1", "127.0.0.2", false},
		{"127.0.0.1", "::1", false},
		{"127.0.0.0/8", "127.255.0.1", true},
		{"127.9.9.9/8", "127.255.0.1", true},
		{"127.0.0.0/8", "128.0.0.1", false},
		{"10.16.0.0/12", "10.31.255.255", true},
		{"10.16.0.0/12", "10.32.0.0", false},
		{"0.0.0.0/0", "9.9.9.9", true},
		{"0.0.0.0/0", "fd00::1", false},
		{"[::/0]", "fd00::1", true},
		{"[::/0]", "9.9.9.9", true},
		{"[::1]", "::1", true},
		{"[fd00::/9]", "fd7f::1", true},
		{"[fd00::/9]", "fd80::1", false},
		{"[::ffff:10.0.0.1]", "10.0.0.1", true},
		{"*", "9.9.9.9", true},
		{"*", "fd00::1", true},
	};

	for (size_t i = 0; i < KM_COUNT(table); i++) {
		char text[64];
		int want = table[i].in ? KM_POLICY_ALLOW : KM_POLICY_DENY;

		snprintf(text, sizeof(text), "allow peer=%s", table[i].net);
		CHECK_IS(decide(text, to(table[i].ip, 80)), want);
		snprintf(text, sizeof(text), "allow peer=%s:80", table[i].net);
		CHECK_IS(decide(text, to(table[i].ip, 80)), want);
		CHECK_IS(decide(text, to(table[i].ip, 81)), KM_POLICY_DENY);
		snprintf(text, sizeof(text), "allow peer=%s:79-81", table[i].net);
		CHECK_IS(decide(text, to(table[i].ip, 81)), want);
		CHECK_IS(decide(text, to(table[i].ip, 82)), KM_POLICY_DENY);
	}
}

static void ends(void)
{
	struct km_policy_query connector = to("127.0.0.1", 80),
			       acceptor = query(false, "127.0.0.1", 80);

	CHECK_IS(decide("allow role=connector", connector), KM_POLICY_ALLOW);
	CHECK_IS(decide("allow role=connector", acceptor), KM_POLICY_DENY);
	CHECK_IS(decide("allow role=acceptor", acceptor), KM_POLICY_ALLOW);
	CHECK_IS(decide("allow role=acceptor", connector), KM_POLICY_DENY);
	CHECK_IS(decide("allow local=*:80", acceptor), KM_POLICY_ALLOW);
	CHECK_IS(decide("allow local=*:80", connector), KM_POLICY_DENY);
	CHECK_IS(decide("allow peer=10.0.0.5:40000", acceptor), KM_POLICY_ALLOW);
	CHECK_IS(decide("allow local=10.0.0.5:40000", connector), KM_POLICY_ALLOW);
	/* These mean the same at both ends. */
	CHECK_IS(decide("allow to=127.0.0.1:80 port=80", acceptor), KM_POLICY_ALLOW);
	CHECK_IS(decide("allow to=127.0.0.1:80 port=80", connector), KM_POLICY_ALLOW);
	/* All fields of a rule have to match. */
	CHECK_IS(decide("allow to=127.0.0.1:80 port=81", connector), KM_POLICY_DENY);
}

static void programs(void)
{
	struct km_policy_query q = to("127.0.0.1", 80);

	CHECK_IS(decide("allow program=envoy", q), KM_POLICY_ALLOW);
	CHECK_IS(decide("allow program=envoy-1.40", q), KM_POLICY_ALLOW);
	CHECK_IS(decide("allow program=envoy-1.4", q), KM_POLICY_DENY);
	CHECK_IS(decide("deny program=nginx\ndefault allow", q), KM_POLICY_ALLOW);
	CHECK_IS(decide("deny program=envoy\ndefault allow", q), KM_POLICY_DENY);
}

static void redirected_connections(void)
{
	struct km_policy_query q = to("10.96.0.7", 80);

	CHECK_IS(decide("allow via=*:15001", q), KM_POLICY_DENY);
	q.redirected = true;
	q.via = at("127.0.0.1", 15001);
	CHECK_IS(decide("allow via=*:15001", q), KM_POLICY_ALLOW);
	CHECK_IS(decide("allow via=*:15006", q), KM_POLICY_DENY);
	CHECK_IS(decide("allow to=10.96.0.0/16:80", q), KM_POLICY_ALLOW);
	CHECK_IS(decide("allow port=15001", q), KM_POLICY_DENY);
}

static void what_is_not_known_yet(void)
{
	static const char text[] = "deny port=81 uid=7\n"
				   "allow port=80-81 uid=1000\n"
				   "allow port=82\n"
				   "deny port=83 via=*:15001\n";
	struct km_policy *policy = parse(text);
	struct km_policy_query q = to("127.0.0.1", 80);

	q.uid_known = q.via_known = false;
	CHECK_IS(km_policy_decide(policy, &q).answer, KM_POLICY_OPEN);
	q.uid_known = true;
	CHECK_IS(km_policy_decide(policy, &q).answer, KM_POLICY_ALLOW);
	CHECK(km_policy_decide(policy, &q).names_uid);
	q.uid = 0;
	CHECK_IS(km_policy_decide(policy, &q).answer, KM_POLICY_DENY);
	CHECK_IS(km_policy_decide(policy, &q).line, 0);
	CHECK(!km_policy_decide(policy, &q).names_uid);
	/* No rule about it depends on who is at the other end. */
	q = to("127.0.0.1", 82);
	q.uid_known = q.via_known = false;
	CHECK_IS(km_policy_decide(policy, &q).answer, KM_POLICY_ALLOW);
	CHECK(!km_policy_decide(policy, &q).names_uid);
	/* Refused in any case: nothing to wait for. */
	q = to("127.0.0.1", 83);
	q.uid_known = q.via_known = false;
	CHECK_IS(km_policy_decide(policy, &q).answer, KM_POLICY_DENY);
	/* A doubt before one that is sure. */
	q = to("127.0.0.1", 81);
	q.uid_known = false;
	CHECK_IS(km_policy_decide(policy, &q).answer, KM_POLICY_OPEN);
	km_policy_free(policy);
	CHECK_IS(km_policy_decide(NULL, &q).answer, KM_POLICY_ALLOW);
	CHECK_IS(km_policy_decide(&km_policy_nothing, &q).answer, KM_POLICY_DENY);
}

/* -- this process ----------------------------------------------------------- */

/* Loads it with standard error in a file, whose content said gets. */
static const struct km_policy *load(const char *value, char said[512])
{
	const struct km_policy *policy;
	FILE *file = tmpfile();
	int err = dup(2);
	size_t n;

	CHECK(file && err >= 0);
	CHECK_IS(dup2(fileno(file), 2), 2);
	policy = km_policy_load(value);
	CHECK_IS(dup2(err, 2), 2);
	close(err);
	rewind(file);
	n = fread(said, 1, 511, file);
	said[n] = '\0';
	fclose(file);
	return policy;
}

static void files(void)
{
	char path[] = "/tmp/kmap-policy-XXXXXX", value[512], said[512], text[256];
	struct km_policy_query q = to("127.0.0.1", 80);
	const struct km_policy *policy;
	int fd = mkstemp(path), n;

	CHECK(fd >= 0);
	/* Its own name: the executable's, whatever comm says. */
	n = snprintf(text, sizeof(text), "allow port=80 program=%s\n",
		     program_invocation_short_name);
	CHECK_IS(write(fd, text, (size_t)n), n);
	policy = load(path, said);
	CHECK_IS(strlen(said), 0);
	CHECK_IS(km_policy_decide(policy, &q).answer, KM_POLICY_ALLOW);
	snprintf(value, sizeof(value), "rules:%s", text);
	policy = load(value, said);
	CHECK_IS(km_policy_decide(policy, &q).answer, KM_POLICY_ALLOW);
	/* One line that names file, line and word; then nothing is allowed. */
	CHECK_IS(write(fd, "allow port=http\ndefault allow\n", 30), 30);
	policy = load(path, said);
	CHECK(strstr(said, path) && strstr(said, "line 2: port=http: a port is"));
	CHECK(strchr(said, '\n') == said + strlen(said) - 1);
	CHECK_IS(km_policy_decide(policy, &q).answer, KM_POLICY_DENY);
	CHECK_IS(ftruncate(fd, KM_POLICY_TEXT + 1), 0);
	CHECK_IS(km_policy_decide(load(path, said), &q).answer, KM_POLICY_DENY);
	CHECK(strstr(said, "longer than"));
	close(fd);
	unlink(path);
	CHECK_IS(km_policy_decide(load(path, said), &q).answer, KM_POLICY_DENY);
	CHECK(strstr(said, "there is no such file"));
	CHECK_IS(km_policy_decide(load("/tmp", said), &q).answer, KM_POLICY_DENY);
	CHECK(strstr(said, "it is a directory"));
	CHECK_IS(km_policy_decide(load("rules:alow", said), &q).answer, KM_POLICY_DENY);
	CHECK(strstr(said, "KMAP_POLICY=rules:...: line 1: alow"));
	CHECK(!load("", said));
}

int main(void)
{
	unit_watchdog();
	errors_name_line_and_word();
	as_many_rules_as_fit();
	the_first_that_matches_decides();
	silence_denies();
	addresses();
	ends();
	programs();
	redirected_connections();
	what_is_not_known_yet();
	files();
	return 0;
}
