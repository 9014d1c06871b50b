# Sourced by the scripts beside it. `ensure_venv EXTRA` leaves .venv (or $NUMBAFLASH_VENV) with numbaflash[EXTRA] installed from this
# checkout, or says in one line why it cannot, and exits. When that is done already it costs milliseconds.

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=${NUMBAFLASH_VENV:-$root/.venv}

ensure_venv() {
    local extra=$1 done
    for done in "$extra" dev; do # dev holds every other extra
        if install_key | cmp -s - "$venv/.installed-$done" && runs_python "$venv/bin/python"; then return; fi
    done
    if ! runs_python "$venv/bin/python"; then make_venv; fi
    install_extra "$extra"
    install_key >"$venv/.installed-$extra"
}

# What an installation depends on: where the checkout lies, and what it asks for.
install_key() { echo "$root" | cat - "$root/pyproject.toml"; }

# Is $1 a Python that numbaflash supports?
runs_python() { "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' >/dev/null 2>&1; }

make_venv() {
    local candidate
    for candidate in ${PYTHON:+"$PYTHON"} python3 python3.13 python3.12 python3.11 python; do
        if ! runs_python "$candidate"; then continue; fi
        say "Making $venv with $("$candidate" --version 2>&1)"
        if "$candidate" -m venv --clear "$venv" >/dev/null 2>&1; then return; fi
        rm -rf "$venv" # half made: it has a Python but no pip
        fail "$candidate cannot make a virtual environment (on Debian and Ubuntu: apt install python3-venv)"
    done
    fail "needs Python 3.11, 3.12 or 3.13 on the PATH or in \$PYTHON; found $(python3 --version 2>/dev/null || echo none)"
}

install_extra() {
    local log=$venv/install-$1.log
    say "Installing numbaflash[$1] into $venv (once; a few minutes on a slow connection)"
    "$venv/bin/python" -m pip install --disable-pip-version-check --progress-bar off --editable "$root[$1]" 2>&1 |
        tee "$log" | show_last_line ||
        fail "pip could not install numbaflash[$1]: $(grep -m1 '^ERROR' "$log" || tail -n1 "$log") (all of it: $log)"
}

# On a terminal, pip's output as one line that keeps changing; elsewhere nothing.
show_last_line() {
    local line
    if [ ! -t 2 ]; then cat >/dev/null; return; fi
    while IFS= read -r line; do printf '\r\033[K  %.70s' "$line" >&2; done
    printf '\r\033[K' >&2
}

say() { echo "$*" >&2; }
fail() { say "$(basename "$0"): $*"; exit 1; }
