#!/bin/sh
# Installs the vmwatch agent in this VM, enrols it, and waits until vmwatch has acknowledged its first sample. Run again, it
# upgrades the agent.
#
# The gateway fills in its URL and the checksums of its packages. Nothing happens before the last line, so an incomplete
# download of this script does nothing.
set -eu

GATEWAY='@PUBLIC_URL@'
# A line for each package: its name and its SHA-256.
PACKAGES='@PACKAGES@'

NAME=vmwatch-agent
STATE=/var/lib/vmwatch-agent
ENROLLMENT=$STATE/identity/enrollment.json
SETTINGS=/etc/vmwatch/agent.env
HEALTH=127.0.0.1:9084
MAX_BYTES=67108864
# How often the script asks the agent, once a second, whether its first sample was acknowledged.
TRIES=60

usage() {
	cat <<-END
	Installs the vmwatch agent in this VM, enrols it, and waits for its first sample. Run again, it upgrades the agent.

	  --instance-id ID   id of this VM in vmwatch; by default the agent finds it
	  --token-file FILE  file that contains the join token
	  --token TOKEN      join token; all users of this VM can read it in the list of processes
	  --ca-file FILE     PEM certificates of the authority that signed the certificate of $GATEWAY;
	                     by default the authorities that this VM trusts
	  --help             show this text

	The join token can also be in the environment variable VMWATCH_JOIN_TOKEN. If it is nowhere, the script asks for it.
	A VM that is enrolled needs no token.
	END
}

say() {
	printf 'vmwatch: %s\n' "$*"
}

fail() {
	say "$@" >&2
	exit 1
}

have() {
	command -v "$1" >/dev/null 2>&1
}

# Runs a command that must not read this script from standard input, and shows the end of its output if it fails.
quietly() {
	if "$@" </dev/null >"$work/log" 2>&1; then
		return 0
	fi
	tail -n 20 "$work/log" >&2
	return 1
}

read_options() {
	while [ $# -gt 0 ]; do
		case $1 in
		--help)
			usage
			exit 0
			;;
		--instance-id | --token-file | --token | --ca-file)
			[ $# -ge 2 ] || fail "$1 needs a value; --help shows the options"
			case $1 in
			--instance-id) instance_id=$2 ;;
			--token-file) token_file=$2 ;;
			--token) token=$2 ;;
			--ca-file) ca_file=$2 ;;
			esac
			shift 2
			;;
		*) fail "unknown option $1; --help shows the options" ;;
		esac
	done
}

# Sets the kind of package that this distribution uses, its file and its checksum.
choose_package() {
	if have apt-get && have dpkg; then
		kind=deb
		architecture=$(dpkg --print-architecture)
	elif have rpm; then
		kind=rpm
		architecture=$(uname -m)
		case $architecture in
		x86_64) architecture=amd64 ;;
		aarch64) architecture=arm64 ;;
		esac
	else
		fail "this distribution is not supported: it has neither apt nor rpm"
	fi
	for file in "$NAME-$architecture.$kind" "$NAME.$kind"; do
		checksum=$(printf '%s\n' "$PACKAGES" | sed -n "s/^$file //p")
		[ -z "$checksum" ] || return 0
	done
	fail "this distribution is not supported: $GATEWAY has no .$kind package for $architecture; its operator can add one"
}

# Ends the script with what is wrong with the connection to the gateway.
unreachable() {
	cat "$work/error" >&2
	case $1 in
	curl-6) fail "DNS: this VM cannot resolve the name in $GATEWAY" ;;
	curl-7 | curl-28) fail "port: $GATEWAY does not answer; check the route to it and the firewalls" ;;
	curl-35 | curl-60 | curl-77 | wget-5)
		fail "TLS: this VM does not accept the certificate of $GATEWAY; check the clock of this VM, which is at" \
			"$(date -u '+%Y-%m-%d %H:%M:%S') UTC, and the authorities that it trusts (or use --ca-file)"
		;;
	curl-22 | wget-8) fail "$GATEWAY refused the download of $file; the line above has the status" ;;
	wget-4) fail "network: $GATEWAY does not answer; check DNS, the route to it and the firewalls" ;;
	*) fail "the download of $file failed ($1)" ;;
	esac
}

download() {
	say "downloading $GATEWAY/packages/$file"
	began=$(date +%s)
	set --
	if have curl; then
		[ -z "$ca_file" ] || set -- --cacert "$ca_file"
		curl --fail --silent --show-error --retry 3 --connect-timeout 15 --max-time 600 --max-filesize "$MAX_BYTES" \
			"$@" --dump-header "$work/headers" --output "$work/$file" "$GATEWAY/packages/$file" \
			2>"$work/error" || unreachable "curl-$?"
	elif have wget; then
		[ -z "$ca_file" ] || set -- --ca-certificate="$ca_file"
		wget --no-verbose --server-response --tries=3 --timeout=15 --max-redirect=0 "$@" \
			--output-document="$work/$file" "$GATEWAY/packages/$file" 2>"$work/error" || unreachable "wget-$?"
		cp "$work/error" "$work/headers"
	else
		fail "curl or wget is needed for the download; install one of them"
	fi
	check_clock "$began" "$(date +%s)"
	actual=$(sha256sum "$work/$file" | cut -d ' ' -f 1)
	[ "$actual" = "$checksum" ] || fail "$file has the SHA-256 $actual instead of $checksum and was not installed;" \
		"if the operator has just replaced it, run the line again"
}

# Compares the clock of the gateway, which it wrote in its answer, with the clock before and after the answer.
check_clock() {
	header=$(sed -n 's/^ *[Dd]ate: *//p' "$work/headers" | tr -d '\r' | tail -n 1)
	there=$(date -d "$header" +%s 2>/dev/null) || return 0
	if [ $((there - $2)) -gt 2 ]; then
		say "warning: the clock of this VM is $((there - $2)) s behind; synchronize it with NTP" >&2
	elif [ $(($1 - there)) -gt 2 ]; then
		say "warning: the clock of this VM is $(($1 - there)) s ahead; synchronize it with NTP" >&2
	fi
}

# The value of a setting of the agent.
setting() {
	sed -n "s/^$1=//p" "$SETTINGS" 2>/dev/null | tail -n 1 | tr -d "\"'"
}

# Whether the settings contain a login to NATS. The agent then ignores an identity.
has_login() {
	grep -Eqs '^VMWATCH_NATS_(URL|USER|PASSWORD_FILE|CREDENTIALS_FILE|NKEY_SEED_FILE|CERTIFICATE_FILE)=.' "$SETTINGS"
}

# Makes sure that the token is in a file, because arguments of the agent would show it to all users.
prepare_token() {
	token=${token:-${VMWATCH_JOIN_TOKEN:-}}
	unset VMWATCH_JOIN_TOKEN
	if has_login; then
		say "this VM logs in to NATS with the settings in $SETTINGS, so it is upgraded and not enrolled"
		needs_enrolment=''
	elif [ -e "$ENROLLMENT" ]; then
		say "this VM is enrolled; its identity is kept"
		needs_enrolment=''
	fi
	if [ -z "$needs_enrolment" ]; then
		token=
		return 0
	fi
	[ -n "$instance_id" ] || instance_id=$(setting VMWATCH_INSTANCE_ID)
	if [ -n "$token_file" ]; then
		[ -r "$token_file" ] || fail "--token-file: $token_file cannot be read"
		return 0
	fi
	[ -n "$token" ] || ask_for_token
	token_file=$work/token
	(umask 077 && printf '%s\n' "$token" >"$token_file")
	token=
}

ask_for_token() {
	if ! (: </dev/tty) 2>/dev/null; then
		fail "a join token is needed: set VMWATCH_JOIN_TOKEN or use --token-file; an administrator of vmwatch creates it"
	fi
	printf 'Join token: ' >/dev/tty
	hidden=yes
	stty -echo </dev/tty
	IFS= read -r token </dev/tty || token=
	stty echo </dev/tty
	hidden=
	printf '\n' >/dev/tty
	[ -n "$token" ] || fail "no join token was entered"
}

is_installed() {
	case $kind in
	deb) dpkg --status "$NAME" 2>/dev/null | grep -q '^Status: .* installed$' ;;
	rpm) rpm --query --quiet "$NAME" ;;
	esac
}

install_package() {
	if is_installed; then
		say "upgrading $NAME"
	else
		say "installing $NAME"
		undo=remove
		# Settings and identity of an earlier installation are kept.
		[ -e "$STATE" ] || [ -e "${SETTINGS%/*}" ] || undo=purge
	fi
	case $kind in
	deb)
		# Changed settings are kept without asking.
		quietly env DEBIAN_FRONTEND=noninteractive apt-get -o DPkg::Lock::Timeout=300 \
			-o Dpkg::Options::=--force-confold install --yes --allow-downgrades "$work/$file"
		;;
	rpm) quietly rpm --upgrade --replacepkgs --oldpackage "$work/$file" ;;
	esac || fail "$file could not be installed; the lines above have the reason"
}

enroll() {
	[ -n "$needs_enrolment" ] || return 0
	say "enrolling this VM"
	# From here on, the gateway may have registered the key of this VM, and only that key can use the token again.
	undo_before=$undo
	[ -z "$undo" ] || undo=remove
	set -- --gateway "$GATEWAY" --token-file "$token_file"
	[ -z "$instance_id" ] || set -- "$@" --instance-id "$instance_id"
	[ -z "$ca_file" ] || set -- "$@" --ca-file "$ca_file"
	code=0
	"$NAME" enroll "$@" </dev/null || code=$?
	# With these exit codes, the gateway has not registered the key.
	case $code in
	64 | 65 | 66 | 68 | 75 | 76 | 77 | 79 | 80) undo=$undo_before ;;
	esac
	case $code in
	0) ;;
	68) refused DNS ;;
	69) refused port ;;
	76) refused TLS ;;
	77 | 79) refused token ;;
	80) refused clock ;;
	*) refused "exit code $code" ;;
	esac
}

refused() {
	fail "$1: this VM could not be enrolled; the lines above have the reason"
}

start() {
	# The administrators of vmwatch see the agent from here on, so it stays installed whatever happens.
	undo=''
	quietly systemctl restart "$NAME" ||
		fail "the agent does not start; \`systemctl status $NAME\` shows the reason"
}

# Sets what the agent answers to a request; succeeds if the status is 200.
ask() {
	if have curl; then
		answer=$(curl --silent --show-error --noproxy '*' --max-time 2 --write-out '%{http_code}' "http://$health/$1" 2>&1) ||
			true
		status=${answer#"${answer%???}"}
		answer=${answer%???}
		[ "$status" = 200 ]
	else
		answer=$(wget --quiet --no-proxy --tries=1 --timeout=2 --content-on-error --output-document=- \
			"http://$health/$1" 2>&1)
	fi
}

# Succeeds if NATS has acknowledged a sample since the agent started. Otherwise sets the reason.
is_reporting() {
	if ! ask readyz; then
		reason=${answer:-the agent does not answer at $health}
		return 1
	fi
	reason="the agent is ready, but none of its samples was acknowledged yet"
	ask metrics && printf '%s\n' "$answer" | grep -q '^vmwatch_agent_parts_published_total.* [1-9]'
}

await_sample() {
	health=$(setting VMWATCH_HEALTH_LISTEN)
	health=${health:-$HEALTH}
	say "waiting for the first sample"
	tries=0
	until is_reporting; do
		tries=$((tries + 1))
		if [ "$tries" -ge "$TRIES" ]; then
			# Without journald, the reason below is all that is known.
			journalctl --unit "$NAME" --lines 5 --no-pager --output cat >&2 2>/dev/null || true
			fail "the agent is installed and enrolled, but vmwatch has not acknowledged a sample in $TRIES s:" \
				"$reason; the agent keeps trying," \
				"and \`journalctl -u $NAME\` shows what it does"
		fi
		sleep 1
	done
	say "done: this VM reports to $GATEWAY"
}

# Removes what a failed installation has left. A package that was there before is kept.
finish() {
	code=$?
	trap - EXIT
	trap '' HUP INT TERM
	# The terminal may be gone; then there is nothing to restore.
	[ -z "$hidden" ] || stty echo </dev/tty || true
	if [ "$code" != 0 ] && [ -n "$undo" ]; then
		say "removing $NAME again" >&2
		case $kind in
		deb) quietly dpkg "--$undo" "$NAME" ;;
		rpm)
			# A package that could not be installed need not be erased.
			{ ! rpm --query --quiet "$NAME" || quietly rpm --erase "$NAME"; } &&
				{ [ "$undo" = remove ] || rm -rf "$STATE"; }
			;;
		esac || say "$NAME could not be removed; remove it by hand" >&2
	fi
	rm -rf "$work"
	exit "$code"
}

main() {
	instance_id='' token='' token_file='' ca_file='' undo='' hidden='' reason='' needs_enrolment=yes
	read_options "$@"
	[ "$(id -u)" = 0 ] || fail "root is needed: run this with sudo"
	have systemctl || fail "this distribution is not supported: it has no systemd"
	choose_package
	work=$(mktemp -d)
	trap finish EXIT
	trap 'exit 129' HUP
	trap 'exit 130' INT
	trap 'exit 143' TERM
	prepare_token
	download
	install_package
	enroll
	start
	await_sample
}

main "$@"
