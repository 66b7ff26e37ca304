#!/bin/bash
#
# sami-agent on each host where guests run, and what tells it of migrations:
# libvirt's hook and events, and the notification driver in nova-compute.

function sami {
    sudo "$SAMI_BIN_DIR/sami" "$@"
}

function install_sami {
    install_package conntrack
    setup_develop "$SAMI_DIR" libvirt,ovs
}

# This host's certificate, of the authority that all hosts share.
function configure_sami_tls {
    local tls=$SAMI_CONF_DIR/tls
    local issued
    if [[ ! -d "$SAMI_PKI_DIR" ]]; then
        sudo install -d "$(dirname "$SAMI_PKI_DIR")"
        sami pki init --folder "$SAMI_PKI_DIR" --name DevStack
    fi
    sudo install -d "$tls"
    if [[ -e "$tls/host.pem" ]]; then
        return
    fi
    issued=$(mktemp -d)
    sami pki issue --folder "$SAMI_PKI_DIR" --output "$issued" "$SAMI_HOST"
    sudo install -m 0600 "$issued/$SAMI_HOST.key" "$tls/host.key"
    sudo install -m 0644 "$issued/$SAMI_HOST.pem" "$tls/host.pem"
    sudo install -m 0644 "$SAMI_PKI_DIR"/{ca,crl}.pem "$tls"
    sudo rm -r "$issued"
}

function configure_sami {
    local socket=/run/sami/agent.sock
    sudo install -d "$SAMI_CONF_DIR" /run/sami
    sudo install -d -m 0700 "$SAMI_STATE_DIR"
    # The file will hold the broker's password.
    sudo install -m 0600 -o "$STACK_USER" /dev/null "$SAMI_CONF_FILE"

    iniset_rpc_backend sami "$SAMI_CONF_FILE"
    iniset "$SAMI_CONF_FILE" agent host "$SAMI_HOST"
    iniset "$SAMI_CONF_FILE" agent driver "$SAMI_DRIVER"
    iniset "$SAMI_CONF_FILE" agent scopes "$SAMI_SCOPES"
    iniset "$SAMI_CONF_FILE" agent journal "$SAMI_STATE_DIR/journal.sqlite"
    iniset "$SAMI_CONF_FILE" agent socket "$socket"
    # nova-compute runs as this user.
    iniset "$SAMI_CONF_FILE" agent socket_mode 0660
    iniset "$SAMI_CONF_FILE" agent socket_group "$(id -g "$STACK_USER")"
    iniset "$SAMI_CONF_FILE" agent socket_users "$STACK_USER"
    iniset "$SAMI_CONF_FILE" policy default "$SAMI_POLICY"
    iniset "$SAMI_CONF_FILE" libvirt uri qemu:///system
    configure_sami_tls
    iniset "$SAMI_CONF_FILE" tls certificate "$SAMI_CONF_DIR/tls/host.pem"
    iniset "$SAMI_CONF_FILE" tls key "$SAMI_CONF_DIR/tls/host.key"
    iniset "$SAMI_CONF_FILE" tls authorities "$SAMI_CONF_DIR/tls/ca.pem"
    iniset "$SAMI_CONF_FILE" tls revoked "$SAMI_CONF_DIR/tls/crl.pem"

    # nova-cpu.conf is made of it when nova-compute starts. In Nova's other
    # services the driver is deaf.
    iniadd "$NOVA_CONF" oslo_messaging_notifications driver sami
    iniset "$NOVA_CONF" sami socket "$socket"

    # Where the hook looks.
    echo "veto = $SAMI_VETO" | sudo tee "$SAMI_CONF_DIR/libvirt-hook.conf" \
        >/dev/null
    sami hook install --folder "$SAMI_LIBVIRT_HOOKS"
    restart_service libvirtd
}

function start_sami {
    local config=$SAMI_CONF_FILE
    run_process sami-agent "$SAMI_BIN_DIR/sami-agent --config-file $config" \
        "" root
}

function stop_sami {
    stop_process sami-agent
    sami hook remove --folder "$SAMI_LIBVIRT_HOOKS"
}

function clean_sami {
    sudo rm -rf "$SAMI_CONF_DIR" "$SAMI_STATE_DIR" /run/sami
    sudo rm -rf "$SAMI_PKI_DIR"
}

if is_service_enabled sami-agent && is_service_enabled n-cpu; then
    case "$1 ${2:-}" in
        "stack install")
            echo_summary "Installing sami_plugin"
            install_sami
            ;;
        "stack post-config")
            echo_summary "Configuring sami-agent"
            configure_sami
            ;;
        "stack extra")
            echo_summary "Starting sami-agent"
            start_sami
            ;;
        "unstack ")
            stop_sami
            ;;
        "clean ")
            clean_sami
            ;;
    esac
fi
