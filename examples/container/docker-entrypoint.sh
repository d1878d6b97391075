#!/bin/sh
# What a routing hub starts. Without arguments, or with options, it runs the module on MERCURE_IN_DIR and
# MERCURE_OUT_DIR; any other words are a command: `medsr doctor`, or what a hub asks of an image to find out its kind.
set -eu
case "${1:-}" in
    "" | -*) exec medsr module --offline "$@" ;;
    *) exec "$@" ;;
esac
