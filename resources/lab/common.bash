# SPDX-License-Identifier: Apache-2.0
# shellcheck shell=bash
# What the lab's scripts share: messages, and where the ingredients (kernel, modules, busybox) are kept.
# Sourced, never run.

lab_dir=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
program=${0##*/}
system_cache=/var/cache/portcullis/lab

# depmod and modprobe live in sbin, which is not in everybody's PATH.
PATH=$PATH:/usr/local/sbin:/usr/sbin:/sbin

say() { printf '%s: %s\n' "$program" "$*" >&2; }

# Ends the script. 125 is the lab's own failure, as with docker and timeout: COMMAND's statuses stay distinguishable.
die() {
  say "$@"
  exit 125
}

# The help of a script is the comment block at its top.
help_text() { sed -n '3,/^[^#]/ { s/^# \{0,1\}//; t print; d; :print p; }' "$1"; }

user_cache() { printf '%s\n' "${XDG_CACHE_HOME:-${HOME:-/nonexistent}/.cache}/portcullis/lab"; }

# The directory that `prepare` fills: what the environment says, or the system's for root, or the user's own.
cache_to_fill() {
  if [[ -n ${PORTCULLIS_LAB_CACHE:-} ]]; then
    printf '%s\n' "$PORTCULLIS_LAB_CACHE"
  elif ((EUID == 0)); then
    printf '%s\n' "$system_cache"
  else
    user_cache
  fi
}

# The directory to read ingredients from: an ordinary user may use what root prepared.
cache_to_use() {
  local candidate
  for candidate in "$(cache_to_fill)" "$(user_cache)" "$system_cache"; do
    if [[ -r $candidate/current/manifest || -n ${PORTCULLIS_LAB_CACHE:-} ]]; then
      printf '%s\n' "$candidate"
      return
    fi
  done
  cache_to_fill
}

# Prints what is missing or damaged of $2 in the directory $1, one line each; fails if anything is.
# The manifest has one line "SIZE PATH" per file.
missing_ingredients() {
  local directory=$1
  if [[ ! -r $directory/manifest ]]; then
    printf '%s in %s\n' "${2-}" "$directory"
    return 1
  fi
  local found
  # The names come from the manifest that prepare wrote: none contains white space.
  # shellcheck disable=SC2046
  found=$(cd "$directory" && stat -c '%s %n' $(cut -d' ' -f2 manifest) 2>/dev/null) || true
  if [[ $found != "$(<"$directory/manifest")" ]]; then
    comm -13 <(sort <<<"$found") <(sort "$directory/manifest") |
      while read -r _ path; do printf '%s (absent or damaged)\n' "$directory/$path"; done
    return 1
  fi
}

# Sets `ingredients`, `release` and `modules_root`, or ends with the way to get them.
use_ingredients() {
  ingredients=$(cache_to_use)/current
  missing_ingredients "$ingredients" >/dev/null ||
    die "the lab's ingredients are not complete: $lab_dir/prepare --check tells what is missing"
  release=$(<"$ingredients/release")
  # modprobe wants a root with lib/modules/RELEASE in it.
  modules_root=$ingredients/root
}

# Sets `emulator`, the program that runs the lab's host, or ends with the way to get it.
use_emulator() {
  emulator=$(cache_to_use)/emulator
  missing_ingredients "$emulator" >/dev/null ||
    die "the lab's emulator is not complete: $lab_dir/prepare --check tells what is missing"
  emulator=$emulator/qemu-system-x86_64
}

# Sets `programs` to where the archives of programs for guests are, or ends with the way to get them.
use_programs() {
  programs=$(cache_to_use)/programs
  missing_ingredients "$programs" >/dev/null ||
    die "the lab's programs for guests are not complete: $lab_dir/prepare --check tells what is missing"
}

# Prints the files of the modules named, with what they depend on, in the order in which they must be inserted.
# Needs modules_root and release. Built-in modules are skipped.
module_files() {
  local listing
  listing=$(modprobe -C /dev/null -d "$modules_root" -S "$release" -a --show-depends "$@" 2>&1) ||
    die "kernel $release: ${listing//$'\n'/; }"
  awk '$1 == "insmod" && !seen[$2]++ { print $2 }' <<<"$listing"
}

# Copies the module file $1 (maybe compressed) as an uncompressed module into the directory $2.
copy_module() {
  local file=$1 name=${1##*/}
  name=${name%.xz}
  if [[ -r ${file%.xz} ]]; then
    cp -- "${file%.xz}" "$2/$name"
  else
    xz -dc -- "$file" >"$2/$name"
  fi
}

need_commands() {
  local command missing=()
  for command in "$@"; do
    command -v "$command" >/dev/null || missing+=("$command")
  done
  ((${#missing[@]} == 0)) || die "not installed: ${missing[*]} ($lab_dir/prepare as root installs what the lab needs)"
}
