#!/bin/sh
# Build the docs site from scratch: tools/docs.sh [FOLDER], else _docs. Needs `pip install -e ".[docs]"`.
set -eu
cd "$(dirname "$0")/.."
to=${1:-_docs}
mkdir -p "$to"
to=$(cd "$to" && pwd)
rm -rf "$to/html" "$to/pages" "$to/doctrees"
python docs/pages.py "$to/pages"
export DOCS_EXTRA="$to/pages/extra"   # llms.txt, which goes beside the pages as it is
python -m sphinx -q -W --keep-going -j 2 -c docs -d "$to/doctrees" "$to/pages" "$to/html"
echo "The site: $to/html/index.html"
