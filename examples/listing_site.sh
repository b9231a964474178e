#!/usr/bin/env bash
# From a table of 5,000 listings, without any interactions, to the first ranked answer over gRPC.
# Run it from the repository after `make setup`:  bash examples/listing_site.sh [FOLDER]
set -euo pipefail
work=${1:-listing-site}
mkdir "$work"
PATH="$PWD/.venv/bin:$PATH"
SECONDS=0

python examples/make_listings.py "$work/listings.csv" 5000
brewline data import csv --items "$work/listings.csv" --map item_id=id --map title=name --map text=description \
  --map category=section --map creator=seller --map price=price "$work/shop"
brewline encoder train "$work/shop" --out "$work/encoder" --minutes 1.5
brewline ranker train "$work/shop" --encoder "$work/encoder" --out "$work/ranker" --minutes 1.5
brewline nightly "$work/shop" --encoder "$work/encoder" --ranker "$work/ranker" --store "$work/store"

brewline serve --store "$work/store" --encoder "$work/encoder" --ranker "$work/ranker" --port 50077 2> "$work/serve.log" &
server=$!
trap 'kill "$server"' EXIT
until grep -q '^ready' "$work/serve.log"; do kill -0 "$server"; sleep 0.2; done
brewline ask recommend --history L00000 --history L00001 -k 8 --address 127.0.0.1:50077
echo "from the table to the first answer: $SECONDS seconds"
