#!/bin/bash
#
# What DevStack does for its plugins, as far as ours asks for it, on a host of the lab:
#
#   lab/devstack.sh stack install | stack post-config | stack extra | unstack | clean
#
# The environment says what DevStack knows: DEST (where the plugin's source is below), DATA_DIR, STACK_USER, NOVA_CONF,
# RABBIT_URL, PYTHON_BIN (where the project's commands are), NOVA_PYTHON (where nova-compute finds packages; may be
# empty), Q_AGENT, RUN (for logs and process ids), SERVICES (n-cpu by default) and any setting of the plugin.
set -euo pipefail
cd "$(dirname "$0")/.."

ENABLED_SERVICES=${SERVICES:-n-cpu}

function define_plugin { :; }
function enable_service { ENABLED_SERVICES+=,$1; }
function is_service_enabled { [[ ,$ENABLED_SERVICES, == *,$1,* ]]; }
function echo_summary { echo "$*"; }
function get_python_exec_prefix { echo "$PYTHON_BIN"; }
function sudo { "$@"; }
function install_package { dpkg-query --show "$@" >/dev/null; }

# The commands are in PYTHON_BIN already; what lives in Nova is put where Nova finds it.
function setup_develop {
    [[ -z "${NOVA_PYTHON:-}" ]] || "$PYTHON_BIN/python" -m pip install --quiet --no-deps --no-build-isolation \
        --upgrade --target "$NOVA_PYTHON" "$1"
}

function iniset {
    local file=$1 section=$2 option=$3 value=$4
    [[ ! -e "$file" ]] || sed -i "/^\[$section\]/,/^\[/{/^$option *=/d}" "$file"
    iniadd "$file" "$section" "$option" "$value"
}

function iniadd {
    local file=$1 section=$2 option=$3 value=$4
    grep -qs "^\[$section\]" "$file" || printf '\n[%s]\n' "$section" >>"$file"
    # After the section's last line, which is the one before the next section or the end: order counts.
    awk -v section="[$section]" -v line="$option = $value" '
        is_in && /^\[/ { print line; is_in = 0 }
        { print }
        $0 == section { is_in = 1 }
        END { if (is_in) print line }' "$file" >"$file.new"
    cat "$file.new" >"$file"  # whose mode and owner stay
    rm "$file.new"
}

function iniset_rpc_backend { iniset "$2" DEFAULT transport_url "$RABBIT_URL"; }

function run_process {
    local service=$1 command=$2
    # shellcheck disable=SC2086  # words
    setsid $command >>"$RUN/$service.log" 2>&1 </dev/null &
    echo $! >"$RUN/$service.pid"
}

function stop_process {
    local pid
    [[ -e "$RUN/$1.pid" ]] || return 0
    pid=$(<"$RUN/$1.pid")
    rm "$RUN/$1.pid"
    kill "$pid" 2>/dev/null || return 0
    while kill -0 "$pid" 2>/dev/null; do sleep 0.1; done
}

# It reads its hooks anew.
function restart_service {
    [[ ! -e "/run/$1.pid" ]] || kill -HUP "$(<"/run/$1.pid")"
}

source devstack/override-defaults
source devstack/settings
source devstack/plugin.sh "$@"
