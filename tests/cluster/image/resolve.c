/* Prints the addresses that this C library's getaddrinfo finds for a name, one a line. Usage: resolve NAME [4|6] */
#include <arpa/inet.h>
#include <netdb.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>

int main(int argc, char **argv)
{
	struct addrinfo hints = {.ai_socktype = SOCK_STREAM}, *list, *one;
	char text[INET6_ADDRSTRLEN];
	int error;

	if (argc < 2)
		return 2;
	if (argc > 2)
		hints.ai_family = strcmp(argv[2], "6") ? AF_INET : AF_INET6;
	error = getaddrinfo(argv[1], NULL, &hints, &list);
	if (error) {
		fprintf(stderr, "%s: %s\n", argv[1], gai_strerror(error));
		return 1;
	}
	for (one = list; one; one = one->ai_next) {
		void *address = one->ai_family == AF_INET
			? (void *)&((struct sockaddr_in *)one->ai_addr)->sin_addr
			: (void *)&((struct sockaddr_in6 *)one->ai_addr)->sin6_addr;
		puts(inet_ntop(one->ai_family, address, text, sizeof text));
	}
	return 0;
}
