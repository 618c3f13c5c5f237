#!/bin/sh
# From a flashed Jetson (JetPack 6 or 7), or a plain Debian or Ubuntu device (arm64, x86-64), to a running scan.
#
#   sudo deploy/jetson/provision.sh --wheel edgekit-0.1.0-py3-none-any.whl --pub edgekit.pub --pack digits.edge.zip
#
#   --wheel FILE   edgekit itself: pip wheel --no-deps --wheel-dir build .
#   --pub FILE     the public key that packs are signed with
#   --pack PACK    the first bundle, for edgekit install
#   --model NAME   the install lies in /var/lib/edgekit/models/NAME; default parcel
#   --source URL   look for newer bundles there every hour
#   --no-jetson    no TensorRT of JetPack's, even on a Jetson
#   --root DIR     provision the system below DIR instead of this one: no packages, nothing is started
#   --dry-run      only say what would be done
#
# Every step first looks whether it is done: run it again at any time, after a mistake, a stop or for a newer wheel. What
# edgekit needs comes from pip's index in the versions of constraints.txt, which lies beside deploy/. No key or bundle that is
# there is changed, nor scan.toml; of update-*.env only what --model and --source ask for, and the old file is kept.
# Step by step: packages, user, folders, environment, key, settings, units, bundle, start.
set -eu
umask 022 # what is made here is for the scan's user to read, whatever the caller's umask

fail() {
    echo "provision: $*" >&2
    exit 1
}

# stopped: the last words of a run that does not come to its end, and what it leaves in /tmp
stopped() {
    status=$?
    [ -z "$scratch" ] || rm -rf "$scratch"
    [ "$status" = 0 ] || [ -z "$step" ] ||
        echo "provision: stopped at the step $step; what was done stays. Run the same line again: it goes on there$notes" >&2
    exit "$status"
}

# did STEP TO DONE WHAT / same STEP WHAT: what changed ("wrote", with --dry-run "would write"), and what was there already
did() {
    changed=$((changed + 1))
    if [ "$dry" = yes ]; then echo "$1: would $2 $4"; else echo "$1: $3 $4"; fi
}
same() {
    echo "$1: $2 (nothing to do)"
}

# look WORDS: something to look at, said again at the end
look() {
    echo "$1"
    notes="$notes
look: $1"
}

# act COMMAND...: run it, or with --dry-run say it
act() {
    if [ "$dry" = yes ]; then
        echo "  would run: $*"
    else
        "$@"
    fi
}

# owe WHAT, paid WHAT, owes WHAT: what a change needs afterwards, noted on disk before the change: a run that was cut off, or
# whose reload failed, is made up for by the next one. Below --root nothing runs, and the device's start does all of it.
owe() {
    [ -n "$root" ] || act mkdir -p "$home"
    [ -n "$root" ] || act touch "$home/owed-$1"
}
paid() {
    act rm -f "$home/owed-$1"
}
owes() {
    [ -e "$home/owed-$1" ]
}

# put STEP FROM TO MODE GROUP [OWED]: a file as it is here
put() {
    if cmp -s "$2" "$root$3" && [ "0$(stat -c %a "$root$3")" = "$4" ]; then
        same "$1" "$3 is there"
    else
        [ -z "${6:-}" ] || owe "$6"
        act mkdir -p "$(dirname "$root$3")"
        # beside it, then renamed: a device that loses power has the old file or the new one
        act install -m "$4" "$2" "$root$3.new"
        act_owner "$5" "$root$3.new"
        act sync "$root$3.new"
        act mv "$root$3.new" "$root$3"
        did "$1" write wrote "$3"
    fi
}

# act_owner GROUP FILE: by number, for the group is the device's, not this machine's
act_owner() {
    [ "$1" = root ] || [ "$(id -u)" != 0 ] || act chown "0:$(number_of group "$1")" "$2"
}

# number_of group|passwd NAME
number_of() {
    if [ "$2" = root ]; then echo 0; fi
    [ "$2" = root ] || [ ! -f "$root/etc/$1" ] || awk -F: -v name="$2" '$1 == name { print $3 }' "$root/etc/$1"
}

# as_user COMMAND...: by the scan's user, who owns the bundles, in his home, where he notes trusted engines; below --root by
# whoever runs this
as_user() {
    if [ -n "$root" ]; then
        act "$@"
    else
        act runuser -u edgekit -- env HOME=/var/lib/edgekit "$@"
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
        did packages install installed "${lacking# }"
    fi
}

user() {
    put user "$deploy/scanner/edgekit.sysusers" /etc/sysusers.d/edgekit.conf 0644 root
    if [ -n "$(number_of passwd edgekit)" ] && [ -n "$(number_of group edgekit)" ]; then
        same user "edgekit is there"
    else
        act systemd-sysusers ${root:+--root="$root"} "$root/etc/sysusers.d/edgekit.conf"
        did user make made edgekit
    fi
}

folders() {
    put folders "$deploy/scanner/edgekit.tmpfiles" /etc/tmpfiles.d/edgekit.conf 0644 root
    lacking=""
    while read -r kind path mode owner group _; do
        [ "$kind" = d ] || continue
        asked="$mode $(number_of passwd "$owner") $(number_of group "$group")"
        [ "$(stat -c '0%a %u %g' "$root$path" 2>/dev/null)" = "$asked" ] || lacking="$lacking $path"
    done <"$deploy/scanner/edgekit.tmpfiles"
    if [ -z "$lacking" ]; then
        same folders "all are there"
    else
        act systemd-tmpfiles ${root:+--root="$root"} --create "$root/etc/tmpfiles.d/edgekit.conf"
        did folders make made "${lacking# }"
    fi
}

# Each wheel has an environment of its own, and the name that the units know leads to it once it is whole: a run that is cut
# off, or finds no network, leaves the scan what it had.
environment() {
    extras="scan,video,sign"
    [ "$jetson" = no ] || extras="$extras,cuda"
    python3 -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
        fail "$(python3 --version) is too old, 3.10 was expected: flash JetPack 6 or 7"
    minor=$(python3 -c 'import sys; print("%d.%d" % sys.version_info[:2])')
    new=$home/venv-$({ echo "$extras $minor"; cat "$wheel" "$constraints"; } | sha256sum | cut -c1-12)
    if [ "$(readlink "$venv")" = "$(basename "$new")" ] && [ -e "$new/provisioned" ]; then
        same environment "$("$venv/bin/edgekit" --version) of this wheel is installed"
        return
    fi
    if [ ! -e "$new/provisioned" ]; then
        act rm -rf "$new" # the half of a run that was cut off
        # TensorRT's Python module is JetPack's package, not pip's: the environment sees the system's modules.
        if [ "$jetson" = yes ]; then
            act python3 -m venv --system-site-packages "$new"
        else
            act python3 -m venv "$new"
        fi
        act "$new/bin/python" -m pip --quiet install --disable-pip-version-check --constraint "$constraints" "${wheel}[$extras]"
        act "$new/bin/edgekit" --version
        act sync --file-system "$new"
        act touch "$new/provisioned"
    fi
    owe restart
    # A folder of that name is of an older script: it makes room.
    [ -L "$venv" ] || [ ! -d "$venv" ] || act mv "$venv" "$home/venv-old"
    act ln -sfn "$(basename "$new")" "$venv.new"
    act mv -T "$venv.new" "$venv"
    did environment install installed "$(basename "$wheel") with $extras in $venv"
    if [ "$jetson" = yes ] && [ "$dry" = no ] && [ -z "$root" ]; then
        "$venv/bin/python" -c "import tensorrt" 2>/dev/null ||
            look "the environment does not see TensorRT; the scan runs on the processor: $venv/bin/edgekit doctor"
    fi
}

key() {
    place=/etc/edgekit/keys/edgekit.pub
    if [ -e "$root$place" ] && ! cmp -s "$pub" "$root$place"; then
        fail "$place is another key than $pub; to trust both for a while, put the new one beside it, in /etc/edgekit/keys; \
to replace it: rm $root$place"
    fi
    put key "$pub" "$place" 0644 root
}

# update_file NAME SOURCE MODEL: where NAME's bundles come from, and where they go. Other lines of a file that is there stay; an
# empty word asks for nothing.
update_file() {
    place=/etc/edgekit/update-$1.env
    old=$root$place
    [ -e "$old" ] || old=/dev/null
    # shellcheck disable=SC2016
    source_asked=$2 model_asked=$3 awk '
        /^SOURCE=/ { seen = seen "s"; if (ENVIRON["source_asked"] != "") $0 = "SOURCE=" ENVIRON["source_asked"] }
        /^MODEL=/ { seen = seen "m"; if (ENVIRON["model_asked"] != "") $0 = "MODEL=" ENVIRON["model_asked"] }
        { print }
        END {
            if (seen !~ /s/ && ENVIRON["source_asked"] != "") print "SOURCE=" ENVIRON["source_asked"]
            if (seen !~ /m/ && ENVIRON["model_asked"] != "") print "MODEL=" ENVIRON["model_asked"]
        }' "$old" >"$scratch/update"
    if [ "$old" != /dev/null ] && cmp -s "$scratch/update" "$old"; then
        same settings "$place is kept"
        return
    fi
    if [ "$old" != /dev/null ]; then
        kept=$old.$(date +%Y%m%dT%H%M%S)
        act cp -p "$old" "$kept"
        look "settings: $place was changed as asked; what it was is kept as ${kept#"$root"}"
    fi
    put settings "$scratch/update" "$place" 0644 root
}

settings() {
    place=/etc/edgekit/scan.toml
    sed "s|models/parcel/|models/$model/|" "$deploy/scanner/scan.toml" >"$scratch/scan.toml"
    if [ ! -e "$root$place" ]; then
        put settings "$scratch/scan.toml" "$place" 0640 edgekit
    else
        same settings "$place is kept"
        grep -v '^[[:space:]]*#' "$root$place" | grep -qF "/models/$model/" ||
            look "settings: $place was there and is kept: it does not name /var/lib/edgekit/models/$model/current; \
to run that, edit it, then: systemctl restart edgekit-scan"
    fi
    asked_model=""
    [ "$named" = no ] && [ -e "$root/etc/edgekit/update-usb.env" ] || asked_model=$model
    update_file usb "$([ -e "$root/etc/edgekit/update-usb.env" ] || echo /media/edgekit)" "$asked_model"
    [ -z "$source" ] || update_file site "$source" "$model"
}

units() {
    system=/etc/systemd/system
    for unit in edgekit-update@.service edgekit-update@.timer media-edgekit.mount; do
        put units "$deploy/scanner/$unit" "$system/$unit" 0644 root reload
    done
    put units "$deploy/scanner/usb-mount.conf" "$system/edgekit-update@usb.service.d/usb-mount.conf" 0644 root reload
    put units "$deploy/scanner/70-edgekit.rules" /etc/udev/rules.d/70-edgekit.rules 0644 root reload
    before=$changed
    [ "$jetson" = no ] ||
        put units "$deploy/scanner/devices.conf" "$system/edgekit-scan.service.d/devices.conf" 0644 root restart
    put units "$deploy/scanner/edgekit-scan.service" "$system/edgekit-scan.service" 0644 root restart
    if owes restart || [ "$changed" != "$before" ]; then owe reload; fi
    if owes reload; then
        act systemctl daemon-reload
        ! command -v udevadm >/dev/null || act udevadm control --reload
        paid reload
        did units reload reloaded "the units and rules"
    fi
}

bundle() {
    place=$root/var/lib/edgekit/models/$model
    if [ -e "$place/current" ]; then
        same bundle "$place/current is there; a newer one: edgekit install"
    else
        from=$pack
        if [ -f "$pack" ]; then # the scan's user may not look into the home of who runs this
            from=$scratch/$(basename "$pack")
            act install -m 0644 "$pack" "$from"
            list=$(dirname "$pack")/revoked.txt # what its makers take back lies beside it
            if [ -f "$list" ]; then act install -m 0644 "$list" "$scratch/revoked.txt"; fi
        fi
        as_user "$venv/bin/edgekit" install "$from" --root "$place" --pub "$root/etc/edgekit/keys"
        did bundle install installed "$pack"
    fi
}

# enabled UNIT: now and at every start of the device
enabled() {
    if [ -n "$root" ]; then
        active=yes
    else
        active=$(systemctl --quiet is-active "$1" && echo yes || echo no)
    fi
    if systemctl ${root:+--root="$root"} --quiet is-enabled "$1" 2>/dev/null && [ "$active" = yes ]; then
        same start "$1 is enabled"
    elif [ -n "$root" ]; then
        act systemctl --root="$root" --quiet enable "$1"
        did start enable enabled "$1"
    else
        act systemctl --quiet enable --now "$1"
        did start "enable and start" "enabled and started" "$1"
    fi
}

start() {
    [ -n "$root" ] || as_user "$venv/bin/edgekit" scan --check /etc/edgekit/scan.toml ||
        fail "edit /etc/edgekit/scan.toml, and run this again"
    if owes restart; then
        act systemctl try-restart edgekit-scan.service # where it runs: the new wheel or unit is taken now
        paid restart
        did start restart restarted "edgekit-scan.service, where it ran, for what is new"
    fi
    enabled edgekit-scan.service
    [ -z "$source" ] || enabled edgekit-update@site.timer
    for old in "$home"/venv-*; do # nothing runs from it now
        [ ! -d "$old" ] || [ "$(basename "$old")" = "$(readlink "$venv")" ] || act rm -rf "$old"
    done
    [ "$jetson" = no ] ||
        echo "power: nvpmodel -q says the mode, nvpmodel -m N sets it, jetson_clocks holds the clocks; figures hold for one mode only"
}

pub="" pack="" wheel="" model=parcel named=no source="" root="" dry=no jetson=auto changed=0 step="" scratch="" notes=""
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
        --model) model=$2 named=yes ;;
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
constraints=$(dirname "$deploy")/constraints.txt
[ -n "$pub" ] || fail "name the public key that packs are signed with: --pub edgekit.pub"
[ -f "$pub" ] || fail "there is no key $pub"
[ -n "$pack" ] || fail "name the first bundle: --pack F.zip"
# No index is asked for edgekit: what has that name there is somebody else's until you have looked.
[ -n "$wheel" ] || fail "name the wheel of edgekit: --wheel F.whl; make one: pip wheel --no-deps --wheel-dir build ."
[ -f "$wheel" ] || fail "there is no wheel $wheel; make one: pip wheel --no-deps --wheel-dir build ."
[ -f "$constraints" ] ||
    fail "there is no $constraints, which names the versions to install: copy it from the repository, beside deploy"
[ -z "$root" ] || [ -d "$root" ] || fail "there is no folder $root"
[ -n "$root" ] || [ "$dry" = yes ] || [ "$(id -u)" = 0 ] || fail "run it as root: sudo $0 ..."
case $model in *[!A-Za-z0-9._-]* | .* | "") fail "--model is a folder's name, not '$model'" ;; esac
[ -z "$root" ] || root=$(realpath "$root")
wheel=$(realpath "$wheel")
[ "$jetson" = no ] || { [ -f "$root/etc/nv_tegra_release" ] && jetson=yes; } || jetson=no
home=$root/opt/edgekit
venv=$home/venv

trap stopped EXIT
trap 'exit 129' HUP
trap 'exit 130' INT
trap 'exit 143' TERM
scratch=$(mktemp -d)
chmod 0755 "$scratch"
for step in packages user folders environment key settings units bundle start; do
    "$step"
done
step=""
if [ "$dry" = yes ]; then
    echo "dry run: $changed steps would change something$notes"
elif [ "$changed" = 0 ]; then
    echo "all was done already$notes"
else
    echo "done: $changed steps changed something$notes"
fi
