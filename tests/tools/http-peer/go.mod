module weft.network/tests/http-peer

go 1.25
