#!/bin/sh
# From a flashed Jetson (JetPack 6 or 7), or a plain Debian or Ubuntu device (arm64, x86-64), to a running scan.
#
#   sudo deploy/jetson/provision.sh --pub edgekit.pub --pack digits.edge.zip [--wheel edgekit-0.1.0-py3-none-any.whl]
#
#   --pub FILE     the public key that packs are signed with
#   --pack PACK    the first bundle, for edgekit install
#   --wheel FILE   this wheel; else edgekit from pip's index
#   --model NAME   the install lies in /var/lib/edgekit/models/NAME; default parcel
#   --source URL   look for newer bundles there every hour
#   --no-jetson    no TensorRT of JetPack's, even on a Jetson
#   --root DIR     provision the system below DIR instead of this one: no packages, nothing is started
#   --dry-run      only say what would be done
#
# Every step first looks whether it is done: run it again at any time, after a mistake or for a newer wheel. It changes no setting,
# key or bundle that is there. Step by step: packages, user and folders, environment, edgekit, key, settings, units, bundle, start.
set -eu

fail() {
    echo "provision: $*" >&2
    exit 1
}

# did STEP WHAT / same STEP WHAT: what changed, and what was there already
did() {
    changed=$((changed + 1))
    echo "$1: $2"
}
same() {
    echo "$1: $2 (nothing to do)"
}

# act COMMAND...: run it, or with --dry-run say it
act() {
    if [ "$dry" = yes ]; then
        echo "  would run: $*"
    else
        "$@"
    fi
}

# put STEP FROM TO MODE GROUP: a file as it is here
put() {
    if cmp -s "$2" "$root$3"; then
        same "$1" "$3 is there"
    else
        act mkdir -p "$(dirname "$root$3")"
        act cp "$2" "$root$3.new" # beside it, then renamed: a device that loses power has the old file or the new one
        act chmod "$4" "$root$3.new"
        act_owner "$5" "$root$3.new"
        act mv "$root$3.new" "$root$3"
        did "$1" "$3 written"
    fi
}

# keep STEP FROM TO MODE GROUP: a file that belongs to the device's owner once it is there
keep() {
    if [ -e "$root$3" ]; then
        same "$1" "$3 is kept"
    else
        put "$@"
    fi
}

# act_owner GROUP FILE: by number, for the group is the device's, not this machine's
act_owner() {
    [ "$1" = root ] || [ "$(id -u)" != 0 ] || act chown "0:$(number_of "$1")" "$2"
}
number_of() {
    [ ! -f "$root/etc/group" ] || awk -F: -v name="$1" '$1 == name { print $3 }' "$root/etc/group"
}

# as_user COMMAND...: by the scan's user, who owns the bundles; below --root by whoever runs this
as_user() {
    if [ -n "$root" ]; then
        act "$@"
    else
        act runuser -u edgekit -- "$@"
    fi
}

packages() {
    wanted="python3 python3-venv"
    [ "$jetson" = no ] || wanted="$wanted python3-libnvinfer"
    lacking=""
    for package in $wanted; do
        dpkg-query -W -f '${Status}' "$package" 2>/dev/null | grep -q "ok installed" || lacking="$lacking $package"
    done
    if [ -n "$root" ]; then
        same packages "those of $root are its own business"
    elif [ -z "$lacking" ]; then
        same packages "$wanted are installed"
    else
        act apt-get -qq update
        # shellcheck disable=SC2086
        act env DEBIAN_FRONTEND=noninteractive apt-get -qq install --yes --no-install-recommends $lacking
        did packages "installed:$lacking"
    fi
}

user_and_folders() {
    put user "$deploy/scanner/edgekit.sysusers" /etc/sysusers.d/edgekit.conf 0644 root
    put folders "$deploy/scanner/edgekit.tmpfiles" /etc/tmpfiles.d/edgekit.conf 0644 root
    if [ -n "$(number_of edgekit)" ]; then
        same user "edgekit is there"
    else
        act systemd-sysusers ${root:+--root="$root"} "$root/etc/sysusers.d/edgekit.conf"
        did user "edgekit made"
    fi
    if [ -d "$root/var/lib/edgekit/models" ] && [ -d "$root/etc/edgekit/keys" ] && [ -d "$root/srv/edgekit/inbox" ]; then
        same folders "all are there"
    else
        act systemd-tmpfiles ${root:+--root="$root"} --create "$root/etc/tmpfiles.d/edgekit.conf"
        did folders "made"
    fi
}

environment() {
    if [ -x "$venv/bin/python" ] && "$venv/bin/python" -c "import pip" 2>/dev/null; then
        same environment "$venv is there"
    else
        python3 -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
            fail "$(python3 --version) is too old, 3.10 was expected: flash JetPack 6 or 7"
        # TensorRT's Python module is JetPack's package, not pip's: the environment sees the system's modules.
        if [ "$jetson" = yes ]; then
            act python3 -m venv --system-site-packages "$venv"
        else
            act python3 -m venv "$venv"
        fi
        did environment "$venv made"
    fi
}

edgekit_itself() {
    extras="scan,video,sign"
    [ "$jetson" = no ] || extras="$extras,cuda"
    what=${wheel:-edgekit}
    # What was asked for, and the wheel's bytes: a wheel of the same version may be another one.
    asked="${what}[$extras] $([ -z "$wheel" ] || sha256sum "$wheel" | cut -d' ' -f1)"
    if [ -x "$venv/bin/edgekit" ] && [ "$(cat "$venv/provisioned" 2>/dev/null)" = "$asked" ]; then
        same edgekit "$("$venv/bin/edgekit" --version) is installed"
    else
        # A wheel of the same version replaces the one that is there; what it needs is not installed again.
        [ -z "$wheel" ] || [ ! -x "$venv/bin/edgekit" ] ||
            act "$venv/bin/python" -m pip --quiet install --disable-pip-version-check --force-reinstall --no-deps "$wheel"
        act "$venv/bin/python" -m pip --quiet install --disable-pip-version-check --upgrade "${what}[$extras]"
        [ "$dry" = yes ] || echo "$asked" >"$venv/provisioned"
        did edgekit "installed $what with $extras"
    fi
    if [ "$jetson" = yes ] && [ "$dry" = no ] && [ -z "$root" ]; then
        "$venv/bin/python" -c "import tensorrt" 2>/dev/null ||
            echo "edgekit: the environment does not see TensorRT; the scan runs on the processor. Look: $venv/bin/edgekit doctor"
    fi
}

key() {
    place=/etc/edgekit/keys/edgekit.pub
    if [ -e "$root$place" ] && ! cmp -s "$pub" "$root$place"; then
        fail "$place is another key than $pub; to trust both for a while, put the new one beside it, in /etc/edgekit/keys; to replace it: rm $root$place"
    fi
    put key "$pub" "$place" 0644 root
}

settings() {
    written=$(mktemp)
    sed "s|models/parcel/|models/$model/|" "$deploy/scanner/scan.toml" >"$written"
    keep settings "$written" /etc/edgekit/scan.toml 0640 edgekit
    printf 'SOURCE=/media/edgekit\nMODEL=%s\n' "$model" >"$written"
    keep settings "$written" /etc/edgekit/update-usb.env 0644 root
    if [ -n "$source" ]; then
        printf 'SOURCE=%s\nMODEL=%s\n' "$source" "$model" >"$written"
        keep settings "$written" /etc/edgekit/update-site.env 0644 root
    fi
    rm -f "$written"
}

units() {
    before=$changed
    for unit in edgekit-scan.service edgekit-update@.service edgekit-update@.timer media-edgekit.mount; do
        put units "$deploy/scanner/$unit" "/etc/systemd/system/$unit" 0644 root
    done
    put units "$deploy/scanner/usb-mount.conf" /etc/systemd/system/edgekit-update@usb.service.d/usb-mount.conf 0644 root
    put units "$deploy/scanner/70-edgekit.rules" /etc/udev/rules.d/70-edgekit.rules 0644 root
    [ "$jetson" = no ] ||
        put units "$deploy/scanner/devices.conf" /etc/systemd/system/edgekit-scan.service.d/devices.conf 0644 root
    if [ -z "$root" ] && [ "$changed" != "$before" ]; then
        act systemctl daemon-reload
        ! command -v udevadm >/dev/null || act udevadm control --reload
    fi
}

bundle() {
    place=$root/var/lib/edgekit/models/$model
    if [ -e "$place/current" ]; then
        same bundle "$place/current is there; a newer one: edgekit install"
    else
        from=$pack
        if [ -f "$pack" ]; then # the scan's user may not look into the home of who runs this
            work=$(mktemp -d)
            act chmod 0755 "$work"
            from=$work/$(basename "$pack")
            act install -m 0644 "$pack" "$from"
        fi
        as_user "$venv/bin/edgekit" install "$from" --root "$place" --pub "$root/etc/edgekit/keys"
        [ -z "${work:-}" ] || rm -rf "$work"
        did bundle "installed $pack"
    fi
}

# enabled UNIT: now and at every start of the device
enabled() {
    if systemctl ${root:+--root="$root"} --quiet is-enabled "$1" 2>/dev/null; then
        same start "$1 is enabled"
    elif [ -n "$root" ]; then
        act systemctl --root="$root" --quiet enable "$1"
        did start "$1 enabled"
    else
        act systemctl --quiet enable --now "$1"
        did start "$1 enabled and started"
    fi
}

start() {
    [ -n "$root" ] || as_user "$venv/bin/edgekit" scan --check /etc/edgekit/scan.toml ||
        fail "edit /etc/edgekit/scan.toml, and run this again"
    enabled edgekit-scan.service
    [ -z "$source" ] || enabled edgekit-update@site.timer
    [ "$jetson" = no ] ||
        echo "power: nvpmodel -q says the mode, nvpmodel -m N sets it, jetson_clocks holds the clocks; figures hold for one mode only"
}

pub="" pack="" wheel="" model=parcel source="" root="" dry=no jetson=auto changed=0
while [ "$#" -gt 0 ]; do
    case $1 in
    --dry-run) dry=yes ;;
    --no-jetson) jetson=no ;;
    --help | -h)
        sed -n '2,/^set /s/^# \{0,1\}//p' "$0"
        exit 0
        ;;
    --pub | --pack | --wheel | --model | --source | --root)
        [ "$#" -ge 2 ] || fail "$1 needs a value"
        case $1 in
        --pub) pub=$2 ;;
        --pack) pack=$2 ;;
        --wheel) wheel=$2 ;;
        --model) model=$2 ;;
        --source) source=$2 ;;
        --root) root=$2 ;;
        esac
        shift
        ;;
    *) fail "there is no option $1; see --help" ;;
    esac
    shift
done

deploy=$(realpath "$(dirname "$0")/..")
[ -n "$pub" ] || fail "name the public key that packs are signed with: --pub edgekit.pub"
[ -f "$pub" ] || fail "there is no key $pub"
[ -n "$pack" ] || fail "name the first bundle: --pack F.zip"
[ -z "$wheel" ] || [ -f "$wheel" ] || fail "there is no wheel $wheel; make one: pip wheel --no-deps --wheel-dir build ."
[ -z "$root" ] || [ -d "$root" ] || fail "there is no folder $root"
[ -n "$root" ] || [ "$dry" = yes ] || [ "$(id -u)" = 0 ] || fail "run it as root: sudo $0 ..."
case $model in *[!A-Za-z0-9._-]* | .* | "") fail "--model is a folder's name, not '$model'" ;; esac
[ -z "$root" ] || root=$(realpath "$root")
[ -z "$wheel" ] || wheel=$(realpath "$wheel")
[ "$jetson" = no ] || { [ -f "$root/etc/nv_tegra_release" ] && jetson=yes; } || jetson=no
venv=$root/opt/edgekit/venv

packages
user_and_folders
environment
edgekit_itself
key
settings
units
bundle
start
if [ "$dry" = yes ]; then
    echo "dry run: $changed steps would change something"
elif [ "$changed" = 0 ]; then
    echo "all was done already"
else
    echo "done: $changed steps changed something"
fi
