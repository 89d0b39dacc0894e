# Sourced by demo.sh and test.sh: a virtual environment in .venv with the project and the extras of $1.
# Installs again only when pyproject.toml or the extras change.

install() {
    local extras=$1 python=${PYTHON:-python3} stamp
    stamp=".venv/installed-${extras}-$(cksum < pyproject.toml | tr ' ' '-')"
    if [ ! -e "$stamp" ]; then
        echo "== Installing glm4export[$extras] into .venv ($("$python" --version))"
        [ -x .venv/bin/python ] || "$python" -m venv .venv
        # Few of the 25,000 modules are ever imported: Python compiles those when they are.
        .venv/bin/python -m pip install --quiet --no-compile --editable ".[$extras]"
        touch "$stamp"
    fi
    PATH="$PWD/.venv/bin:$PATH"
}
