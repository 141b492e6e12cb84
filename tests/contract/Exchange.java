import java.net.URI;
import java.net.http.HttpClient;
import java.net.http.HttpRequest;
import java.net.http.HttpResponse;
import java.nio.charset.StandardCharsets;
import java.time.Duration;
import java.time.Instant;
import java.time.format.DateTimeFormatter;
import java.util.Base64;
import java.util.Scanner;

/**
 * Sends requests as the clients' transport does: the JDK's own client, HTTP/1.1, no redirects, a content type with
 * every request. Each line of the input is a method, an address and, for a POST, its body in base64; or "instant" and a
 * text that has to be one. Each line of the output is a status and the answer's body in base64; or the instant.
 */
public class Exchange {
    public static void main(String[] args) throws Exception {
        HttpClient client = HttpClient.newBuilder()
                .version(HttpClient.Version.HTTP_1_1)
                .followRedirects(HttpClient.Redirect.NEVER)
                .connectTimeout(Duration.ofSeconds(30))
                .build();
        Scanner input = new Scanner(System.in, StandardCharsets.UTF_8);
        while (input.hasNextLine()) {
            String[] words = input.nextLine().split(" ");
            if (words[0].equals("instant")) {
                System.out.println(DateTimeFormatter.ISO_INSTANT.parse(words[1], Instant::from));
                continue;
            }
            HttpRequest.Builder request = HttpRequest.newBuilder(URI.create(words[1]))
                    .header("Content-Type", "application/json");
            if (words[0].equals("POST")) {
                byte[] body = Base64.getDecoder().decode(words[2]);
                request.POST(HttpRequest.BodyPublishers.ofByteArray(body));
            } else {
                request.GET();
            }
            HttpResponse<byte[]> answer = client.send(request.build(), HttpResponse.BodyHandlers.ofByteArray());
            System.out.println(answer.statusCode() + " " + Base64.getEncoder().encodeToString(answer.body()));
        }
    }
}
