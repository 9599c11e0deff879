/* The descriptor store of the service manager of a node (`node` beside this file), one for each unit that asks for it.
 *
 *   keeper keep SOCKET MAX     serves NOTIFY_SOCKET until it is killed: FDSTORE=1, FDSTOREREMOVE=1 and FDNAME= of sd_notify(3)
 *   keeper give SOCKET WORD... becomes the command, which gets what is kept as sd_listen_fds(3) says
 */
#define _GNU_SOURCE
#include <err.h>
#include <fcntl.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <unistd.h>

enum { MOST = 253 /* SCM_MAX_FD */, FIRST = 3, GIVE_ABOVE = 300 };

static int kept[MOST], count, most;
static char names[MOST][64];

static struct sockaddr_un address(const char *path) {
    struct sockaddr_un at = {.sun_family = AF_UNIX};
    if (strlen(path) >= sizeof at.sun_path) errx(64, "%s is too long", path);
    strcpy(at.sun_path, path);
    return at;
}

/* Sends or receives a text with descriptors; returns its length. */
static ssize_t exchange(int socket, struct sockaddr_un *with, socklen_t *with_len, char *text, size_t len, int *descriptors,
                        int *number, int receive) {
    char control[CMSG_SPACE(sizeof(int) * MOST)] = {0};
    struct iovec piece = {text, len};
    struct msghdr message = {.msg_name = with, .msg_namelen = *with_len, .msg_iov = &piece, .msg_iovlen = 1};
    if (receive || *number > 0) {
        message.msg_control = control;
        message.msg_controllen = receive ? sizeof control : CMSG_SPACE(sizeof(int) * *number);
    }
    if (!receive) {
        if (*number > 0) {
            struct cmsghdr *header = CMSG_FIRSTHDR(&message);
            *header = (struct cmsghdr){.cmsg_level = SOL_SOCKET, .cmsg_type = SCM_RIGHTS, .cmsg_len = CMSG_LEN(sizeof(int) * *number)};
            memcpy(CMSG_DATA(header), descriptors, sizeof(int) * *number);
        }
        return sendmsg(socket, &message, MSG_NOSIGNAL);
    }
    ssize_t got = recvmsg(socket, &message, MSG_CMSG_CLOEXEC);
    *with_len = message.msg_namelen;
    *number = 0;
    for (struct cmsghdr *header = CMSG_FIRSTHDR(&message); header; header = CMSG_NXTHDR(&message, header))
        if (header->cmsg_type == SCM_RIGHTS) {
            *number = (header->cmsg_len - CMSG_LEN(0)) / sizeof(int);
            memcpy(descriptors, CMSG_DATA(header), sizeof(int) * *number);
        }
    return got;
}

/* Whether two descriptors are one open file (kcmp(2), KCMP_FILE). */
static int same(int a, int b) { return syscall(SYS_kcmp, getpid(), getpid(), 0, a, b) == 0; }

static void store(const char *name, int descriptor) {
    for (int i = 0; i < count; i++)
        if (same(kept[i], descriptor)) { close(descriptor); return; }
    if (count == most) { warnx("no room for %s", name); close(descriptor); return; }
    snprintf(names[count], sizeof names[count], "%s", name);
    kept[count++] = descriptor;
}

static void forget(const char *name) {
    int left = 0;
    for (int i = 0; i < count; i++) {
        if (!strcmp(names[i], name)) { close(kept[i]); continue; }
        if (left != i) strcpy(names[left], names[i]);
        kept[left++] = kept[i];
    }
    count = left;
}

static void keep(const char *path) {
    struct sockaddr_un at = address(path), from;
    int socket_ = socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0), descriptors[MOST], number;
    unlink(path);
    /* A unit may have become another user. */
    umask(0);
    if (socket_ < 0 || bind(socket_, (void *)&at, sizeof at) < 0) err(1, "%s", path);
    for (;;) {
        char text[4096] = {0}, reply[MOST * 65] = "";
        socklen_t from_len = sizeof from;
        if (exchange(socket_, &from, &from_len, text, sizeof text - 1, descriptors, &number, 1) < 0) err(1, "receive");
        if (!strcmp(text, "GIVE")) {
            for (int i = 0; i < count; i++) { strcat(reply, names[i]); strcat(reply, i + 1 < count ? ":" : ""); }
            number = count;
            if (exchange(socket_, &from, &from_len, reply, strlen(reply) + 1, kept, &number, 0) < 0) warn("give");
            continue;
        }
        char *name = strstr(text, "FDNAME=");
        name = name ? strsep(&(char *){name + 7}, "\n") : "stored";
        int stores = !strncmp(text, "FDSTORE=1", 9);
        if (!strncmp(text, "FDSTOREREMOVE=1", 15)) forget(name);
        for (int i = 0; i < number; i++)
            if (stores) store(name, descriptors[i]);
            else close(descriptors[i]);
    }
}

static void give(const char *path, char **command) {
    struct sockaddr_un at = address(path), own = {.sun_family = AF_UNIX};
    socklen_t at_len = sizeof at;
    int socket_ = socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0), descriptors[MOST], number = 0;
    char text[MOST * 65] = "GIVE", word[16];
    /* An abstract name of the kernel's choice, for the answer. */
    if (socket_ < 0 || bind(socket_, (void *)&own, sizeof own.sun_family) < 0) err(1, "socket");
    if (exchange(socket_, &at, &at_len, text, 4, descriptors, &number, 0) < 0) err(1, "%s", path);
    if (exchange(socket_, &own, &at_len, text, sizeof text, descriptors, &number, 1) < 0) err(1, "%s", path);
    for (int i = 0; i < number; i++) descriptors[i] = fcntl(descriptors[i], F_DUPFD_CLOEXEC, GIVE_ABOVE);
    for (int i = 0; i < number; i++) dup2(descriptors[i], FIRST + i);
    if (number > 0) {
        snprintf(word, sizeof word, "%d", getpid());
        setenv("LISTEN_PID", word, 1);
        snprintf(word, sizeof word, "%d", number);
        setenv("LISTEN_FDS", word, 1);
        setenv("LISTEN_FDNAMES", text, 1);
    }
    setenv("NOTIFY_SOCKET", path, 1);
    execvp(command[0], command);
    err(127, "%s", command[0]);
}

int main(int argc, char **argv) {
    if (argc == 4 && !strcmp(argv[1], "keep")) {
        most = atoi(argv[3]) < MOST ? atoi(argv[3]) : MOST;
        keep(argv[2]);
    }
    if (argc > 3 && !strcmp(argv[1], "give")) give(argv[2], argv + 3);
    errx(64, "keep SOCKET MAX | give SOCKET COMMAND...");
}
