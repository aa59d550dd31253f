/* Preloaded (LD_PRELOAD), this notes in the file CONNECTS every internet address that a process looks up, connects to
   or sends to. In C, so that native code is seen as well: libraries in Rust and C++, git, children of any kind. */

#define _GNU_SOURCE
#include <arpa/inet.h>
#include <dlfcn.h>
#include <errno.h>
#include <netdb.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/socket.h>

#define NEXT(function) ((__typeof__(&function))dlsym(RTLD_NEXT, #function))

static void note(const char *call, const char *address)
{
    FILE *file = getenv("CONNECTS") ? fopen(getenv("CONNECTS"), "a") : NULL;
    if (file) {
        fprintf(file, "%s %s (%s)\n", call, address, program_invocation_name);
        fclose(file);
    }
}

static void note_socket(const char *call, const struct sockaddr *address)
{
    char text[INET6_ADDRSTRLEN] = "";
    if (address && address->sa_family == AF_INET)
        inet_ntop(AF_INET, &((const struct sockaddr_in *)address)->sin_addr, text, sizeof text);
    else if (address && address->sa_family == AF_INET6)
        inet_ntop(AF_INET6, &((const struct sockaddr_in6 *)address)->sin6_addr, text, sizeof text);
    else
        return; /* a socket of this machine's, such as that of its name service */
    note(call, text);
}

int connect(int fd, __CONST_SOCKADDR_ARG address, socklen_t length)
{
    note_socket("connect", address.__sockaddr__);
    return NEXT(connect)(fd, address, length);
}

ssize_t sendto(int fd, const void *data, size_t size, int flags, __CONST_SOCKADDR_ARG address, socklen_t length)
{
    note_socket("sendto", address.__sockaddr__);
    return NEXT(sendto)(fd, data, size, flags, address, length);
}

ssize_t sendmsg(int fd, const struct msghdr *message, int flags)
{
    note_socket("sendmsg", message->msg_name);
    return NEXT(sendmsg)(fd, message, flags);
}

int getaddrinfo(const char *host, const char *service, const struct addrinfo *hints, struct addrinfo **found)
{
    note("getaddrinfo", host ? host : "");
    return NEXT(getaddrinfo)(host, service, hints, found);
}
